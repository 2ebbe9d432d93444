//! Large blocks of memory, kept and given out again.
//!
//! A training step allocates and frees the same large buffers over and over. An allocator that gives them back to the system
//! pays for a zeroed page at each first touch: on a virtual machine a fifth of a training step and more. Blocks from
//! [`LARGE`] on are therefore mapped in size classes, with huge pages asked for, and kept until they are asked for again;
//! smaller ones are mimalloc's. Before more is mapped than was ever lent at one time, with [`SLACK`] for the classes, kept
//! blocks go back to the system.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mimalloc::MiMalloc;

/// Blocks of this many bytes and more are kept here.
const LARGE: usize = 1 << 18;
/// Four classes to each power of two.
const CLASSES: usize = 4 * (usize::BITS as usize);
/// A request may take a kept block this many classes above its own: twice its size.
const REACH: usize = 4;
/// How many classes away a kept block may be whose pages are taken for a new one: eight make a factor of four.
const RESHAPED: usize = 8;
/// In front of every block: its class. A cache line, which is also the largest alignment served here.
const HEADER: usize = 64;
/// What may be mapped beyond the most that was ever lent, as a part of that.
const SLACK: usize = 8;
const HUGE_PAGE: usize = 1 << 21;

/// The process's allocator.
pub(crate) struct Caching;

/// The kept blocks, as lists through their first words after the header.
struct Kept {
    free: [*mut u8; CLASSES],
    mapped: usize,
    lent: usize,
    most_lent: usize,
}

// SAFETY: the pointers are to blocks that nobody else holds, and the mutex around them lets one thread at them.
unsafe impl Send for Kept {}

static KEPT: Mutex<Kept> = Mutex::new(Kept {
    free: [null_mut(); CLASSES],
    mapped: 0,
    lent: 0,
    most_lent: 0,
});

/// The class whose blocks hold `bytes` and a header.
fn class_of(bytes: usize) -> Option<usize> {
    let bytes = bytes.checked_add(HEADER)?;
    let power = bytes.checked_next_power_of_two()?;
    let step = (bytes - power / 2).div_ceil(power / 8).max(1);
    Some(4 * power.trailing_zeros() as usize + step - 1)
}

/// Bytes of a class's blocks, header included.
fn block_bytes(class: usize) -> usize {
    let power = 1 << (class / 4);
    power / 2 + (class % 4 + 1) * (power / 8)
}

impl Kept {
    fn lock() -> MutexGuard<'static, Self> {
        KEPT.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of at least that class, and whether its pages are new and zero; null where the system has none.
    fn lend(&mut self, class: usize) -> (*mut u8, bool) {
        for class in class..(class + REACH).min(CLASSES) {
            let block = self.pop(class);
            if !block.is_null() {
                self.count(class);
                return (block, false);
            }
        }
        let bytes = block_bytes(class);
        let reshaped = self.reshape(class);
        let limit = self.most_lent.max(self.lent + bytes);
        self.shrink(limit + limit / SLACK - bytes);
        let is_zero = reshaped.is_null();
        let mapping = if is_zero { pages::map(bytes) } else { reshaped };
        if mapping.is_null() {
            return (mapping, true);
        }
        self.mapped += bytes;
        self.count(class);
        // SAFETY: a block is larger than its header, which is where its class is written.
        let block = unsafe {
            mapping.cast::<usize>().write(class);
            mapping.add(HEADER)
        };
        (block, is_zero)
    }

    /// The mapping of a block of that class with the pages of a kept one of another, the next smaller before the next larger;
    /// null where none is kept. Pages that are there need not be zeroed again by the system.
    fn reshape(&mut self, class: usize) -> *mut u8 {
        let smaller = (class.saturating_sub(RESHAPED)..class).rev();
        let larger = class + REACH..(class + REACH + RESHAPED).min(CLASSES);
        for from in smaller.chain(larger) {
            let block = self.pop(from);
            if block.is_null() {
                continue;
            }
            self.mapped -= block_bytes(from);
            // SAFETY: the mapping began a header before the block, and nobody holds it.
            return unsafe {
                let mapping = block.sub(HEADER);
                pages::resize(mapping, block_bytes(from), block_bytes(class))
            };
        }
        null_mut()
    }

    fn count(&mut self, class: usize) {
        self.lent += block_bytes(class);
        self.most_lent = self.most_lent.max(self.lent);
    }

    fn pop(&mut self, class: usize) -> *mut u8 {
        let block = self.free[class];
        if !block.is_null() {
            // SAFETY: a block in a list is ours, and `take_back` wrote the next one's address there.
            self.free[class] = unsafe { block.cast::<*mut u8>().read() };
        }
        block
    }

    /// # Safety
    /// `block` came from [`Kept::lend`], and nobody uses it any more.
    unsafe fn take_back(&mut self, block: *mut u8) {
        // SAFETY: the class stands in front of every block, and the block itself is free to be written.
        unsafe {
            let class = block.sub(HEADER).cast::<usize>().read();
            block.cast::<*mut u8>().write(self.free[class]);
            self.free[class] = block;
            self.lent -= block_bytes(class);
        }
    }

    /// Gives kept blocks back, the largest first, until at most `limit` bytes are mapped or none is kept.
    fn shrink(&mut self, limit: usize) {
        for class in (0..CLASSES).rev() {
            while self.mapped > limit {
                let block = self.pop(class);
                if block.is_null() {
                    break;
                }
                // SAFETY: the mapping began a header before the block, and nobody holds it.
                unsafe { pages::unmap(block.sub(HEADER), block_bytes(class)) };
                self.mapped -= block_bytes(class);
            }
        }
    }
}

#[cfg(unix)]
mod pages {
    use super::HUGE_PAGE;

    /// New zeroed pages; null where the system has none. Where huge pages fit they are asked for, and the block begins at one:
    /// a page costs the system the same to hand out whatever its size.
    pub(super) fn map(bytes: usize) -> *mut u8 {
        if bytes < HUGE_PAGE {
            return map_anywhere(bytes);
        }
        let Some(room) = bytes.checked_add(HUGE_PAGE) else {
            return std::ptr::null_mut();
        };
        let mapping = map_anywhere(room);
        if mapping.is_null() {
            return mapping;
        }
        let before = mapping.align_offset(HUGE_PAGE);
        // SAFETY: `before + bytes <= room`; what is unmapped lies in the new mapping, outside the block, and both its ends are
        // whole pages because `HUGE_PAGE` and a class's bytes are.
        unsafe {
            let block = mapping.add(before);
            if before > 0 {
                libc::munmap(mapping.cast(), before);
            }
            if room - before > bytes {
                libc::munmap(block.add(bytes).cast(), room - before - bytes);
            }
            #[cfg(target_os = "linux")]
            libc::madvise(block.cast(), bytes, libc::MADV_HUGEPAGE);
            block
        }
    }

    /// The mapping with its pages, as many as fit, at another size; null, and nothing is mapped, where the system refuses.
    ///
    /// # Safety
    /// `mapping` came from [`map`] with `before` bytes, and nobody uses it any more.
    #[cfg(target_os = "linux")]
    pub(super) unsafe fn resize(mapping: *mut u8, before: usize, bytes: usize) -> *mut u8 {
        let target = map(bytes);
        if target.is_null() {
            // SAFETY: the caller's promise.
            unsafe { unmap(mapping, before) };
            return target;
        }
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the caller's promise; `target` is a mapping of `bytes` that nobody has touched, and is replaced.
        unsafe {
            let moved = libc::mremap(
                mapping.cast(),
                before,
                bytes,
                how,
                target.cast::<libc::c_void>(),
            );
            if moved == libc::MAP_FAILED {
                unmap(mapping, before);
                return target;
            }
            if bytes >= HUGE_PAGE {
                libc::madvise(moved, bytes, libc::MADV_HUGEPAGE);
            }
            moved.cast()
        }
    }

    /// Where pages cannot be moved, the mapping is given back and null returned.
    ///
    /// # Safety
    /// `mapping` came from [`map`] with `before` bytes, and nobody uses it any more.
    #[cfg(not(target_os = "linux"))]
    pub(super) unsafe fn resize(mapping: *mut u8, before: usize, _: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { unmap(mapping, before) };
        std::ptr::null_mut()
    }

    fn map_anywhere(bytes: usize) -> *mut u8 {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping touches no memory of ours.
        let mapping = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
        match mapping == libc::MAP_FAILED {
            true => std::ptr::null_mut(),
            false => mapping.cast(),
        }
    }

    /// # Safety
    /// `mapping` came from [`map`] with as many bytes, and nobody uses it any more.
    pub(super) unsafe fn unmap(mapping: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { libc::munmap(mapping.cast(), bytes) };
    }
}

#[cfg(not(unix))]
mod pages {
    use std::alloc::{GlobalAlloc, Layout};

    use mimalloc::MiMalloc;

    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes, super::HEADER).ok()
    }

    /// New zeroed pages; null where the system has none.
    pub(super) fn map(bytes: usize) -> *mut u8 {
        // SAFETY: a block is never empty.
        layout(bytes).map_or(std::ptr::null_mut(), |layout| unsafe {
            MiMalloc.alloc_zeroed(layout)
        })
    }

    /// Pages cannot be moved: the mapping is given back and null returned.
    ///
    /// # Safety
    /// `mapping` came from [`map`] with `before` bytes, and nobody uses it any more.
    pub(super) unsafe fn resize(mapping: *mut u8, before: usize, _: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { unmap(mapping, before) };
        std::ptr::null_mut()
    }

    /// # Safety
    /// `mapping` came from [`map`] with as many bytes, and nobody uses it any more.
    pub(super) unsafe fn unmap(mapping: *mut u8, bytes: usize) {
        if let Some(layout) = layout(bytes) {
            // SAFETY: the caller's promise.
            unsafe { MiMalloc.dealloc(mapping, layout) };
        }
    }
}

/// Whether blocks of this layout are kept here; always the same answer for the same layout.
fn is_kept(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= HEADER
}

// SAFETY: small blocks are mimalloc's from beginning to end. A kept one has the bytes asked for behind its header, is aligned
// to a cache line because its mapping is aligned to a page, and is in no list while it is lent.
unsafe impl GlobalAlloc for Caching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !is_kept(layout) {
            // SAFETY: the caller's promise.
            return unsafe { MiMalloc.alloc(layout) };
        }
        class_of(layout.size()).map_or(null_mut(), |class| Kept::lock().lend(class).0)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !is_kept(layout) {
            // SAFETY: the caller's promise.
            return unsafe { MiMalloc.alloc_zeroed(layout) };
        }
        let Some(class) = class_of(layout.size()) else {
            return null_mut();
        };
        let (block, is_zero) = Kept::lock().lend(class);
        if !is_zero {
            // SAFETY: the block has at least `layout.size()` bytes and nobody else has it.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise: `block` came from the same branch of `alloc`.
        unsafe {
            if is_kept(layout) {
                Kept::lock().take_back(block);
            } else {
                MiMalloc.dealloc(block, layout);
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `size` fits the alignment.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if !is_kept(layout) && !is_kept(wanted) {
            // SAFETY: the caller's promise; both sizes are mimalloc's.
            return unsafe { MiMalloc.realloc(block, layout, size) };
        }
        if is_kept(layout) && is_kept(wanted) && class_of(layout.size()) == class_of(size) {
            return block;
        }
        // SAFETY: the two blocks are distinct, and both hold the smaller size.
        unsafe {
            let new = self.alloc(wanted);
            if !new.is_null() {
                std::ptr::copy_nonoverlapping(block, new, layout.size().min(size));
                self.dealloc(block, layout);
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_its_requests_and_wastes_at_most_a_quarter() {
        let mut last = 0;
        for bytes in (LARGE..4 * LARGE)
            .step_by(997)
            .chain([1 << 30, (1 << 30) + 1])
        {
            let class = class_of(bytes).unwrap();
            let block = block_bytes(class);
            assert!(block >= bytes + HEADER, "{bytes} in {block}");
            assert!(block - bytes - HEADER <= block / 4, "{bytes} in {block}");
            assert!(
                class >= last && class < CLASSES,
                "classes grow with their size"
            );
            assert_eq!(
                class_of(block - HEADER),
                Some(class),
                "a block's size is its class's largest request"
            );
            last = class;
        }
        assert_eq!(class_of(usize::MAX), None);
    }

    #[test]
    fn kept_blocks_go_back_before_more_is_mapped_than_was_lent() {
        let mut kept = Kept {
            free: [null_mut(); CLASSES],
            mapped: 0,
            lent: 0,
            most_lent: 0,
        };
        let class = class_of(LARGE).unwrap();
        for round in 0..8 {
            // Each round needs more than any block that is kept.
            let (block, is_zero) = kept.lend(class + REACH * round);
            assert!(!block.is_null());
            assert_eq!(is_zero, round == 0 || !cfg!(target_os = "linux"));
            // SAFETY: it was lent two lines above, and holds its class's largest request.
            unsafe { block.write_bytes(7, block_bytes(class + REACH * round) - HEADER) };
            // SAFETY: it was lent a line above.
            unsafe { kept.take_back(block) };
            let limit = kept.most_lent + kept.most_lent / SLACK;
            assert!(
                kept.mapped <= limit,
                "{} bytes for {}",
                kept.mapped,
                kept.most_lent
            );
        }
        assert_eq!(kept.lent, 0);
        assert!(
            !kept.lend(class + 7 * REACH).1,
            "the largest is still there"
        );
        kept.shrink(0);
        assert_eq!(
            kept.mapped,
            block_bytes(class + 7 * REACH),
            "what is lent stays"
        );
    }

    #[test]
    fn a_freed_block_comes_back_and_zeroed_ones_are_zero() {
        let layout = Layout::from_size_align(LARGE + 5, 64).unwrap();
        // SAFETY: each block is written inside its size and freed once with the layout it was asked for with.
        unsafe {
            let block = Caching.alloc(layout);
            assert_eq!(block as usize % 64, 0);
            block.write_bytes(7, layout.size());
            let grown = Caching.realloc(block, layout, 5 * LARGE);
            assert_eq!([grown.read(), grown.add(layout.size() - 1).read()], [7, 7]);
            let small = Layout::from_size_align(5 * LARGE, 64).unwrap();
            let shrunk = Caching.realloc(grown, small, 100);
            assert_eq!(shrunk.add(99).read(), 7);
            Caching.dealloc(shrunk, Layout::from_size_align(100, 64).unwrap());
            for _ in 0..3 {
                let zeroed = Caching.alloc_zeroed(layout);
                assert!((0..layout.size()).all(|i| zeroed.add(i).read() == 0));
                zeroed.write_bytes(9, layout.size());
                Caching.dealloc(zeroed, layout);
            }
        }
    }

    #[test]
    fn threads_do_not_get_each_others_blocks() {
        std::thread::scope(|scope| {
            for mark in 0..4u8 {
                scope.spawn(move || {
                    for round in 0..200 {
                        let bytes = LARGE + 4096 * (round % 7);
                        let block = vec![mark; bytes];
                        assert!(block.iter().all(|&byte| byte == mark));
                    }
                });
            }
        });
    }
}
