//! Caches on their way from memory while others are multiplied.

use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Lines asked for with each row that a block of 16 positions is multiplied by, where that is more than the block itself has. Samples
/// of one prompt then have their own keys and values about when the prompt's are done with; fewer come late, more are in each
/// other's way.
const LINES_A_ROW: usize = 3;

/// Memory in the order in which it will be read.
#[derive(Default)]
pub(super) struct Ahead(VecDeque<Range<*const u8>>);

impl Ahead {
    /// Appends what is read after all else.
    pub(super) fn extend(&mut self, read: impl IntoIterator<Item = Range<*const u8>>) {
        self.0.extend(read);
    }

    /// Asks for the next lines, while as many rows are multiplied by `block`: at least as many lines as that has.
    pub(super) fn ask<W>(&mut self, block: &[W], rows: usize) {
        let mut lines = size_of_val(block).div_ceil(LINE).max(rows * LINES_A_ROW);
        while lines > 0
            && let Some(next) = self.0.front_mut()
        {
            if next.start < next.end {
                ask_for(next.start);
                next.start = next.start.wrapping_add(LINE);
                lines -= 1;
            } else {
                self.0.pop_front();
            }
        }
    }

    #[cfg(test)]
    pub(super) fn lines_left(&self) -> usize {
        let bytes =
            |range: &Range<*const u8>| (range.end as usize).saturating_sub(range.start as usize);
        self.0.iter().map(|range| bytes(range).div_ceil(LINE)).sum()
    }
}

/// A line into the second-level cache.
fn ask_for(#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every such processor has the instruction, and an address that is nobody's is no fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
}
