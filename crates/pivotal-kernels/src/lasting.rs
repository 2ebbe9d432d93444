//! Memory of weights: allocated once, read at every step.
//!
//! A product of few rows reads its weight from memory, and in pages of 4 KiB it spends a quarter of its time on finding them. The
//! system backs large blocks with huge pages where it is asked to (the program's allocator asks), so small weights lie together in
//! such blocks.

use std::alloc::Layout;
use std::cell::UnsafeCell;
use std::sync::{Arc, Mutex, PoisonError};

use crate::parallel::Line;

/// Lines of a block that weights share: a little less than 32 MiB, which leaves an allocator room for a header.
const SHARED_LINES: usize = (1 << 19) - 64;
/// A weight of more lines has a block of its own.
const LARGE_LINES: usize = SHARED_LINES / 4;

/// Floats of a weight, aligned to a cache line: a part of a block.
#[derive(Debug)]
pub(crate) struct LastingFloats {
    block: Arc<Block>,
    /// First line.
    first: usize,
    len: usize,
}

/// Lines that are parts of several [`LastingFloats`]. It is freed when the last of them is.
#[derive(Debug)]
struct Block(Vec<UnsafeCell<Line>>);

// SAFETY: every line is of one `LastingFloats` at most, whose borrows are those of the line.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

/// The block that the next weight may be a part of, and how many lines of it are taken.
static CURRENT: Mutex<Option<(Arc<Block>, usize)>> = Mutex::new(None);

impl Block {
    /// Zeros that nobody has written: pages that stay unused are never there.
    fn zeroed(lines: usize) -> Arc<Self> {
        let layout = Layout::array::<UnsafeCell<Line>>(lines).expect("a block that fits in memory");
        if layout.size() == 0 {
            return Arc::new(Self(Vec::new()));
        }
        // SAFETY: the layout is not empty; zeroed floats are zeros; the memory is a vector's of so many elements, an `UnsafeCell`
        // having the layout of what is in it.
        Arc::new(Self(unsafe {
            let start = std::alloc::alloc_zeroed(layout).cast::<UnsafeCell<Line>>();
            if start.is_null() {
                std::alloc::handle_alloc_error(layout);
            }
            Vec::from_raw_parts(start, lines, lines)
        }))
    }
}

impl LastingFloats {
    /// `len` zeros that lie with others: for as long as any of those is there, their memory is.
    pub(crate) fn zeroed(len: usize) -> Self {
        let lines = len.div_ceil(16);
        if lines > LARGE_LINES {
            return Self::alone(len);
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (block, first) = match current.take() {
            Some((block, taken)) if taken + lines <= SHARED_LINES => (block, taken),
            _ => (Block::zeroed(SHARED_LINES), 0),
        };
        *current = Some((Arc::clone(&block), first + lines));
        Self { block, first, len }
    }

    /// `len` zeros in a block of their own.
    pub(crate) fn alone(len: usize) -> Self {
        Self {
            block: Block::zeroed(len.div_ceil(16)),
            first: 0,
            len,
        }
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        // SAFETY: there are lines for `len` floats from `first` on, which are this part's own; a `Line` is 16 floats without
        // padding.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as above, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }

    fn start(&self) -> *mut f32 {
        UnsafeCell::raw_get(self.block.0[self.first..].as_ptr()).cast()
    }
}

impl Clone for LastingFloats {
    fn clone(&self) -> Self {
        // It may be one that is replaced before its neighbours.
        let mut made = Self::alone(self.len);
        made.as_mut_slice().copy_from_slice(self.as_slice());
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_apart_aligned_and_zero() {
        let lens = [0, 1, 16, 17, 1000, 16 * LARGE_LINES, 16 * LARGE_LINES + 1];
        let mut parts: Vec<LastingFloats> = lens.map(LastingFloats::zeroed).into();
        parts.push(LastingFloats::alone(5));
        for (value, part) in parts.iter_mut().enumerate() {
            assert_eq!(part.as_slice().as_ptr().addr() % 64, 0);
            assert!(part.as_slice().iter().all(|x| x.to_bits() == 0));
            part.as_mut_slice().fill(value as f32);
        }
        let copies = parts.clone();
        for (value, part) in parts.iter_mut().enumerate() {
            assert!(part.as_slice().iter().all(|&x| x == value as f32));
            part.as_mut_slice().fill(-1.0);
        }
        for (value, copy) in copies.iter().enumerate() {
            assert!(copy.as_slice().iter().all(|&x| x == value as f32));
        }
    }

    #[test]
    fn many_parts_fill_more_than_one_block() {
        let parts: Vec<_> = (0..9)
            .map(|_| LastingFloats::zeroed(16 * LARGE_LINES))
            .collect();
        let mut starts: Vec<_> = parts.iter().map(|part| part.start().addr()).collect();
        starts.sort_unstable();
        let bytes = 64 * LARGE_LINES;
        assert!(starts.windows(2).all(|two| two[1] - two[0] >= bytes));
        let blocks = parts.iter().map(|part| Arc::as_ptr(&part.block));
        assert!(blocks.collect::<std::collections::BTreeSet<_>>().len() >= 3);
    }

    #[test]
    fn a_block_goes_with_its_last_part() {
        let part = LastingFloats::alone(100);
        let block = Arc::downgrade(&part.block);
        drop(part);
        assert!(block.upgrade().is_none());
    }
}
