//! Cutting work into blocks for rayon's current pool.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::team::{Hands, LastOf, hands};

/// Scalar operations below which handing work to another thread costs more than it saves (a rayon join is a few
/// microseconds; a core does about 10 such operations a nanosecond).
pub(crate) const SERIAL_WORK: usize = 1 << 16;

/// Runs `body` over `0..count` in blocks of `block`, in parallel when `work` (about the number of multiply-adds) is worth it.
/// The blocks are the same either way.
pub(crate) fn for_each_block(
    count: usize,
    block: usize,
    work: usize,
    body: impl Fn(Range<usize>) + Sync + Send,
) {
    for_each_block_of_shares(count, block, work, |range, _| body(range));
}

/// [`for_each_block`] for bodies that want to know when a thread of a team has come to the last block of its share.
pub(crate) fn for_each_block_of_shares(
    count: usize,
    block: usize,
    work: usize,
    body: impl Fn(Range<usize>, Option<LastOf>) + Sync + Send,
) {
    let block = block.max(1);
    let blocks = count.div_ceil(block);
    let range = |index: usize| index * block..(index * block + block).min(count);
    let last = |index| (index + 1 == blocks).then_some(LastOf::WHOLE);
    let serial = || (0..blocks).for_each(|index| body(range(index), last(index)));
    match hands() {
        // In a team too, where handing out costs less: what is made on another core has to come from there.
        _ if blocks <= 1 || work < SERIAL_WORK => serial(),
        Hands::Own => serial(),
        Hands::Team(team) => team.run(blocks, |index, last| body(range(index), last)),
        Hands::Pool => (0..blocks)
            .into_par_iter()
            .for_each(|index| body(range(index), None)),
    }
}

/// Runs `body` on each of `items`, on all threads; on this one alone where it works on a block or an item already. Inside a team
/// ([`with_team`](crate::with_team)) the kernels that `body` calls stay on the item's thread, which so shares nothing with the others.
///
/// # Examples
/// ```
/// let mut sums = [0; 3];
/// pivotal_kernels::for_each_item(sums.iter_mut().zip([1, 2, 3]), |(sum, add)| *sum += add);
/// assert_eq!(sums, [1, 2, 3]);
/// ```
pub fn for_each_item<T: Send>(items: impl IntoIterator<Item = T>, body: impl Fn(T) + Sync + Send) {
    let items: Vec<_> = items
        .into_iter()
        .map(|item| Mutex::new(Some(item)))
        .collect();
    for_each_block(items.len(), 1, usize::MAX, |indices| {
        for item in &items[indices] {
            let item = item.lock().unwrap_or_else(PoisonError::into_inner).take();
            body(item.expect("a block is run once"));
        }
    });
}

/// Rows cut into blocks of about the same size and as many for each thread, so that threads end together.
#[derive(Clone, Copy, Debug)]
pub struct EvenBlocks {
    rows: usize,
    unit: usize,
    blocks: usize,
}

impl EvenBlocks {
    /// Cuts `rows` into blocks of `most` at most, which begin at multiples of `unit`; fewer than `threads` only if there are fewer units.
    ///
    /// # Panics
    /// If `unit` or `threads` is 0, or `most` less than `unit`.
    ///
    /// # Examples
    /// ```
    /// use pivotal_kernels::EvenBlocks;
    /// let blocks: Vec<_> = EvenBlocks::new(604, 32, 128, 2).iter().collect();
    /// assert_eq!(blocks, [0..96, 96..192, 192..288, 288..384, 384..480, 480..604]);
    /// ```
    #[must_use]
    pub fn new(rows: usize, unit: usize, most: usize, threads: usize) -> Self {
        let units = rows.div_ceil(unit);
        let blocks = units.div_ceil(threads * (most / unit)) * threads;
        Self {
            rows,
            unit,
            blocks: blocks.min(units),
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.blocks
    }

    /// The rows of block `index`.
    pub(crate) fn get(&self, index: usize) -> Range<usize> {
        let units = self.rows.div_ceil(self.unit);
        let start = |block: usize| (block * units / self.blocks * self.unit).min(self.rows);
        start(index)..start(index + 1)
    }

    /// The blocks in order.
    pub fn iter(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.blocks).map(move |index| self.get(index))
    }

    /// [`for_each_block`] of these.
    pub(crate) fn for_each(self, work: usize, body: impl Fn(Range<usize>) + Sync + Send) {
        for_each_block(self.blocks, 1, work, |blocks| {
            blocks.for_each(|index| body(self.get(index)));
        });
    }
}

/// Rows a block should hold so that one block of rows of `width` is worth a task of its own.
pub(crate) fn rows_per_block(width: usize) -> usize {
    (8192 / width.max(1)).max(1)
}

/// Zeros written by all threads: pages that are new are then handed out to each of them at once, and none waits for another.
pub fn zeros(len: usize) -> Vec<f32> {
    const BLOCK: usize = 1 << 16;
    if len <= BLOCK {
        return vec![0.0; len];
    }
    let mut values = Vec::with_capacity(len);
    values.spare_capacity_mut()[..len]
        .par_chunks_mut(BLOCK)
        .for_each(|block| {
            block.fill(std::mem::MaybeUninit::new(0.0));
        });
    // SAFETY: the first `len` elements were written above.
    unsafe { values.set_len(len) };
    values
}

/// A vector of `len` floats that `write` fills, its pages first touched by whoever writes them.
///
/// # Safety
/// `write` writes each of the `len` floats, and reads none that it has not written.
pub(crate) unsafe fn written(len: usize, write: impl FnOnce(SharedOut)) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    write(SharedOut(values.as_mut_ptr()));
    // SAFETY: the capacity is there, and the caller promises that the elements are.
    unsafe { values.set_len(len) };
    values
}

/// A pointer into an output that several tasks write at disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct SharedOut(*mut f32);

// SAFETY: the pointer comes from a `&mut [f32]` that outlives the parallel call, and every user writes disjoint elements.
unsafe impl Send for SharedOut {}
// SAFETY: as above; sharing the wrapper only copies the address.
unsafe impl Sync for SharedOut {}

impl SharedOut {
    pub(crate) fn new(out: &mut [f32]) -> Self {
        Self(out.as_mut_ptr())
    }

    /// The address of element `index`.
    ///
    /// # Safety
    /// `index` must lie inside the slice this was made from.
    pub(crate) unsafe fn at(self, index: usize) -> *mut f32 {
        // SAFETY: the caller keeps `index` inside the allocation.
        unsafe { self.0.add(index) }
    }

    /// `len` elements from `index` on.
    ///
    /// # Safety
    /// The range must lie inside the slice this was made from, and no other task may touch it meanwhile.
    pub(crate) unsafe fn slice<'a>(self, index: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: in bounds and unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(index), len) }
    }
}

/// A cache line: vector loads from memory aligned to it never straddle two.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; 16]);

/// Floats aligned to a cache line.
#[derive(Debug, Default)]
pub(crate) struct AlignedFloats {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedFloats {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self {
            lines: vec![Line([0.0; 16]); len.div_ceil(16)],
            len,
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: a `Line` is 16 floats without padding, and there are enough lines for `len` floats.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Floats a thread keeps for its next call: fresh pages are dear, the first touch costs as much as the arithmetic.
const KEPT_SCRATCH: usize = 16 << 20;

thread_local! {
    static SCRATCH: RefCell<Vec<AlignedFloats>> = const { RefCell::new(Vec::new()) };
}

/// Lends `body` a buffer of each length in `lens`, of unspecified content, kept by this thread between calls and aligned to cache lines.
///
/// # Examples
/// ```
/// let sum = pivotal_kernels::with_scratch_parts([2, 1], |[two, one]| {
///     two.copy_from_slice(&[1.0, 2.0]);
///     one[0] = 4.0;
///     two[0] + two[1] + one[0]
/// });
/// assert_eq!(sum, 7.0);
/// ```
pub fn with_scratch_parts<const N: usize, T>(
    lens: [usize; N],
    body: impl FnOnce([&mut [f32]; N]) -> T,
) -> T {
    let lines = |len: usize| len.next_multiple_of(16);
    with_scratch(lens.map(lines).iter().sum(), |mut rest| {
        body(lens.map(|len| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(lines(len));
            rest = after;
            &mut part[..len]
        }))
    })
}

/// Lends `body` a buffer of `len` floats of unspecified content, kept by this thread between calls.
pub(crate) fn with_scratch<T>(len: usize, body: impl FnOnce(&mut [f32]) -> T) -> T {
    // Taken out rather than borrowed: while `body` waits on rayon, this thread may steal a task that asks for scratch too.
    let mut buffer = SCRATCH
        .with(|kept| kept.borrow_mut().pop())
        .unwrap_or_default();
    if buffer.len < len {
        buffer = AlignedFloats::zeroed(len);
    }
    let result = body(&mut buffer.as_mut_slice()[..len]);
    if buffer.len <= KEPT_SCRATCH {
        SCRATCH.with(|kept| {
            let mut kept = kept.borrow_mut();
            if kept.len() < 8 {
                kept.push(buffer);
            }
        });
    }
    result
}

/// Panics unless `slice` has `rows` times `columns` elements: more than can be counted is no slice's number.
#[track_caller]
pub(crate) fn check_matrix<T>(name: &str, slice: &[T], rows: usize, columns: usize) {
    assert!(
        rows.checked_mul(columns) == Some(slice.len()),
        "`{name}` has {} elements, expected {rows} x {columns}",
        slice.len()
    );
}

/// Whether a matrix of so many rows and columns, so far apart, ends within `len` elements.
pub(crate) fn reaches(
    len: usize,
    (rows, columns): (usize, usize),
    strides: (usize, usize),
) -> bool {
    if rows == 0 || columns == 0 {
        return true;
    }
    let last_row = (rows - 1).checked_mul(strides.0);
    let last = (columns - 1)
        .checked_mul(strides.1)
        .and_then(|column| column.checked_add(last_row?));
    last.is_some_and(|last| last < len)
}

/// Panics unless `slice` has `expected` elements.
#[track_caller]
pub(crate) fn check_len<T>(name: &str, slice: &[T], expected: usize) {
    assert!(
        slice.len() == expected,
        "`{name}` has {} elements, expected {expected}",
        slice.len()
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn blocks_tile_the_range_serially_and_in_parallel() {
        for work in [0, usize::MAX] {
            for (count, block) in [(0, 4), (1, 4), (4, 4), (5, 4), (9, 0)] {
                let seen = Mutex::new(vec![0; count]);
                for_each_block(count, block, work, |range| {
                    range.for_each(|index| seen.lock().unwrap()[index] += 1);
                });
                assert!(seen.into_inner().unwrap().iter().all(|&times| times == 1));
            }
        }
    }

    #[test]
    fn even_blocks_tile_the_rows() {
        for rows in [0, 1, 15, 65, 97, 340, 1000, 1024, 2347] {
            for (threads, unit, most) in [(1, 16, 96), (2, 32, 128), (3, 8, 100), (16, 16, 96)] {
                let cut = EvenBlocks::new(rows, unit, most, threads);
                let blocks: Vec<_> = cut.iter().collect();
                let mut end = 0;
                for block in &blocks {
                    assert_eq!(block.start, end);
                    assert!(!block.is_empty() && block.len() <= most);
                    assert!(block.start.is_multiple_of(unit));
                    end = block.end;
                }
                assert_eq!((end, blocks.len()), (rows, cut.len()));
                let whole = &blocks[..blocks.len().saturating_sub(1)];
                let sizes = || whole.iter().map(Range::len);
                assert!(sizes().max() <= sizes().min().map(|least| least + unit));
                let units = rows.div_ceil(unit);
                assert!(blocks.len().is_multiple_of(threads) || units == blocks.len());
            }
        }
    }

    #[test]
    fn shared_out_writes_where_it_says() {
        let mut out = vec![0.0; 10];
        let shared = SharedOut::new(&mut out);
        for_each_block(10, 2, usize::MAX, |range| {
            // SAFETY: the blocks are disjoint parts of `out`.
            let part = unsafe { shared.slice(range.start, range.len()) };
            part[0] = range.start as f32;
            // SAFETY: as above.
            unsafe { *shared.at(range.end - 1) = 1.0 };
        });
        assert_eq!(out, [0.0, 1.0, 2.0, 1.0, 4.0, 1.0, 6.0, 1.0, 8.0, 1.0]);
    }

    #[test]
    fn zeros_are_zero_at_every_length() {
        for len in [0, 1, 1 << 16, (1 << 16) + 1, 3 << 16] {
            drop(vec![1.0_f32; len]);
            let values = zeros(len);
            assert!(values.len() == len && values.iter().all(|value| value.to_bits() == 0));
        }
    }

    #[test]
    fn aligned_floats_are_floats_and_aligned() {
        for len in [0, 1, 16, 17] {
            let mut floats = AlignedFloats::zeroed(len);
            assert_eq!(floats.as_mut_slice(), vec![0.0; len]);
            floats.as_mut_slice().fill(2.0);
            assert_eq!(floats.as_mut_slice(), vec![2.0; len]);
            assert_eq!(floats.as_mut_slice().as_ptr().addr() % 64, 0);
        }
    }

    #[test]
    fn parts_of_scratch_are_apart_and_aligned() {
        with_scratch_parts([3, 0, 17, 1], |parts| {
            for (value, part) in parts.into_iter().enumerate() {
                assert_eq!(part.len(), [3, 0, 17, 1][value]);
                assert_eq!(part.as_ptr().addr() % 64, 0);
                part.fill(value as f32);
            }
        });
        with_scratch_parts([3, 17], |[a, b]| {
            a.fill(1.0);
            b.fill(2.0);
            assert!(a.iter().all(|&x| x == 1.0) && b.iter().all(|&x| x == 2.0));
        });
    }

    #[test]
    fn nested_scratch_is_two_buffers() {
        with_scratch(3, |outer| {
            outer.fill(1.0);
            with_scratch(3, |inner| inner.fill(2.0));
            assert_eq!(outer, [1.0; 3]);
        });
    }

    #[test]
    #[should_panic(expected = "`weight` has 2 elements, expected 3")]
    fn a_wrong_length_is_named() {
        check_len("weight", &[0.0; 2], 3);
    }

    #[test]
    #[should_panic(expected = "`weight` has 0 elements, expected 9223372036854775808 x 2")]
    fn more_elements_than_can_be_counted_are_not_none() {
        check_matrix("weight", &[0.0; 0], 1 << 63, 2);
    }

    #[test]
    fn a_matrix_ends_where_its_last_element_does() {
        assert!(reaches(0, (0, 9), (9, 1)) && reaches(0, (9, 0), (9, 1)));
        assert!(reaches(12, (3, 2), (5, 1)) && !reaches(11, (3, 2), (5, 1)));
        assert!(!reaches(usize::MAX, (1 << 63, 2), (2, 1)));
        assert!(!reaches(usize::MAX, (2, 2), (usize::MAX, 1)));
    }
}
