//! Rows that hold several things side by side, taken apart.

use crate::parallel::{SharedOut, check_len, for_each_block, rows_per_block};

/// Copies columns of `joined` `[rows, all widths]` into `parts`, one after the other; a part is `[rows, width]`.
///
/// # Panics
/// If the lengths do not fit.
///
/// # Examples
/// ```
/// let (mut left, mut right) = ([0.0; 2], [0.0; 4]);
/// pivotal_kernels::split_columns(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, &mut [&mut left, &mut right]);
/// assert_eq!((left, right), ([1.0, 4.0], [2.0, 3.0, 5.0, 6.0]));
/// ```
pub fn split_columns(joined: &[f32], rows: usize, parts: &mut [&mut [f32]]) {
    let widths = widths(rows, parts.iter().map(|part| part.len()));
    let total: usize = widths.iter().sum();
    check_len("joined", joined, rows * total);
    let targets: Vec<_> = parts.iter_mut().map(|part| SharedOut::new(part)).collect();
    for_each_block(rows, rows_per_block(total), joined.len(), |block| {
        for row in block {
            let mut rest = &joined[row * total..][..total];
            for (target, &width) in targets.iter().zip(&widths) {
                // SAFETY: row `row` of every part is this block's own.
                unsafe { target.slice(row * width, width) }.copy_from_slice(&rest[..width]);
                rest = &rest[width..];
            }
        }
    });
}

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

#[track_caller]
fn widths(rows: usize, lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let width = |length: usize| {
        let width = length / rows.max(1);
        assert!(
            width * rows == length,
            "a part of {length} elements is no {rows} rows"
        );
        width
    };
    lengths.map(width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn every_row_of_every_part_is_its_columns() {
        for rows in [0, 1, 63, 700] {
            let joined = random(rows * 23, 1);
            let (mut a, mut b, mut c) = (vec![0.0; rows * 3], vec![0.0; rows * 20], vec![]);
            split_columns(&joined, rows, &mut [&mut a, &mut c, &mut b]);
            for (row, joined) in joined.chunks_exact(23).enumerate() {
                assert_eq!(a[3 * row..][..3], joined[..3]);
                assert_eq!(b[20 * row..][..20], joined[3..]);
            }
        }
    }
}
