//! Sums of rows.

use crate::parallel::{SharedOut, check_len, for_each_block};

/// `y += x`, element by element: the sum that a residual stream makes of what a layer adds to it.
///
/// # Panics
/// If the lengths differ.
///
/// # Examples
/// ```
/// let mut y = [1.0, 2.0];
/// pivotal_kernels::add_into(&mut y, &[10.0, 20.0]);
/// assert_eq!(y, [11.0, 22.0]);
/// ```
pub fn add_into(y: &mut [f32], x: &[f32]) {
    const BLOCK: usize = 1 << 14;
    check_len("x", x, y.len());
    let target = SharedOut::new(y);
    for_each_block(x.len(), BLOCK, x.len(), |block| {
        // SAFETY: the blocks are disjoint parts of `y`.
        let y = unsafe { target.slice(block.start, block.len()) };
        y.iter_mut().zip(&x[block]).for_each(|(y, x)| *y += x);
    });
}
