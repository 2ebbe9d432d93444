//! Products with bf16 operands and f32 sums, on processors with AMX: tile registers of 16 rows and 64 bytes.
//!
//! `tdpbf16ps` multiplies 16 rows of 32 elements by 16 columns and adds to 16 × 16 sums. The right operand's panels, 48 columns
//! pair by pair, are three such tiles beside each other; the left one's are tiles already (`panels.rs`).
//!
//! The intrinsics are not stable, inline assembly is. One block of assembly does all that needs tile registers: sums begin
//! as zero or as what is in memory, run over all pieces, and go back to memory. Between blocks only the shape of the tiles
//! stays, for as long as a [`Tiles`] lives.
//!
//! An element's sum runs over its pairs in ascending order, sixteen at a time, whatever the rows and columns beside it.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use crate::panels::{COLUMNS, TILE_ROWS};

/// Rows of the largest block of sums: two tiles.
pub(crate) const BLOCK_ROWS: usize = 2 * TILE_ROWS;
/// Bytes of a left tile.
const LEFT_TILE: usize = 1024;

/// Whether the processor has AMX with BF16 and the system lets this process use it. Asks the system, once is enough.
pub(crate) fn offered() -> bool {
    const TILE: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    const OSXSAVE: u32 = 1 << 27;
    /// The state components of the tiles' configuration and of their data.
    const STATE: u64 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let has = __cpuid_count(7, 0).edx;
    if has & TILE == 0 || has & BF16 == 0 {
        return false;
    }
    #[target_feature(enable = "xsave")]
    fn enabled() -> u64 {
        // SAFETY: register 0 is there wherever `xgetbv` is.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: OSXSAVE says that `xgetbv` is there.
    let enabled = unsafe { enabled() };
    enabled & STATE == STATE && permitted()
}

/// Linux keeps the tiles' state (8 KiB a thread) from a process until it asks.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XTILEDATA: u64 = 18;
    let answer: i64;
    // SAFETY: a system call with two numbers; it reads and writes no memory of ours, and the kernel overwrites `rcx` and
    // `r11` only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The tiles of this thread, all of 16 rows and 64 bytes, until it is dropped. Not to be held across a wait for other tasks,
/// which would drop theirs.
pub(crate) struct Tiles(PhantomData<*mut ()>);

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// # Safety
    /// [`offered`] has said yes.
    pub(crate) unsafe fn configure() -> Self {
        static EIGHT: Configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        // SAFETY: the instruction is there by the caller's promise and reads 64 bytes of a valid configuration. It zeroes the
        // tiles, in which nothing is kept between blocks of assembly.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &raw const EIGHT,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        Self(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: this thread's tiles were configured, and no block of assembly runs. Released, they need not be saved when
        // threads switch.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// A stretch of the sums: where its tiles begin, and how many there are along the sum. The assembly knows the order.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Piece {
    /// Left tiles of the first 16 rows, one after the other.
    pub(crate) left: *const u32,
    /// Those of the next 16 rows; any valid ones where there are none.
    pub(crate) below: *const u32,
    /// The right operand's first pair, and bytes from a pair to the next.
    pub(crate) right: *const u32,
    pub(crate) right_row: usize,
    pub(crate) tiles: usize,
}

impl Piece {
    pub(crate) const NONE: Self = Self {
        left: std::ptr::null(),
        below: std::ptr::null(),
        right: std::ptr::null(),
        right_row: 0,
        tiles: 0,
    };
}

/// Where a block of sums goes.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub(crate) out: *mut f32,
    /// Floats from a row to the next.
    pub(crate) stride: usize,
    /// 1 to 32.
    pub(crate) rows: usize,
    /// 1 to 48.
    pub(crate) columns: usize,
    /// Whether the sums begin with what is there.
    pub(crate) add: bool,
    /// Whether the right operand comes from memory, so that asking for it early pays. From the caches it costs.
    pub(crate) streams: bool,
}

/// A function for a block of so many tiles: one or two below each other, one to three beside each other.
macro_rules! block_kernel {
    ($name:ident, zero $zero:tt, load $load:tt, step $step:tt, store $store:tt) => {
        block_kernel!($name, fetch [], zero $zero, load $load, step $step, store $store);
    };
    ($name:ident and $streaming:ident, zero $zero:tt, load $load:tt, step $step:tt, store $store:tt) => {
        block_kernel!($name, fetch [], zero $zero, load $load, step $step, store $store);
        // The 48 lines that three right tiles take, 8 KiB ahead: past a panel's end it is the next panel's.
        block_kernel!(
            $streaming,
            fetch [
                ".irp at, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23"
                "prefetcht0 [{right} + 8192 + 64 * \\at]"
                "prefetcht0 [{right} + 8192 + 1536 + 64 * \\at]"
                ".endr"
            ],
            zero $zero, load $load, step $step, store $store
        );
    };
    ($name:ident, fetch $fetch:tt, zero $zero:tt, load $load:tt, step $step:tt, store $store:tt) => {
        /// # Safety
        /// As for [`multiply`], and the block of sums is all the tiles'.
        unsafe fn $name(pieces: &[Piece], out: *mut f32, stride: usize, add: bool) {
            // SAFETY: the instructions are there and the tiles configured, for there is a `Tiles`; what the pieces and the
            // block name is the caller's.
            unsafe { block_kernel!(@asm pieces, out, stride, add, $fetch, $zero, $load, $step, $store) }
        }
    };
    (@asm $pieces:ident, $out:ident, $stride:ident, $add:ident,
     [$($fetch:literal)*], [$($zero:literal)*], [$($load:literal)*], [$($step:literal)*], [$($store:literal)*]) => {
        asm!(
            "test {tiles}, {tiles}",
            "jnz 2f",
            $($zero,)*
            "jmp 3f",
            "2:",
            $($load,)*
            "3:",
            "test {count}, {count}",
            "jz 6f",
            "4:",
            "mov {left}, [{piece}]",
            "mov {below}, [{piece} + 8]",
            "mov {right}, [{piece} + 16]",
            "mov {right_row}, [{piece} + 24]",
            "mov {tiles}, [{piece} + 32]",
            "mov {right_tile}, {right_row}",
            "shl {right_tile}, 4",
            "test {tiles}, {tiles}",
            "jz 7f",
            "5:",
            $($fetch,)*
            $($step,)*
            "add {left}, {left_tile}",
            "add {below}, {left_tile}",
            "add {right}, {right_tile}",
            "dec {tiles}",
            "jnz 5b",
            "7:",
            "add {piece}, 40",
            "dec {count}",
            "jnz 4b",
            "6:",
            $($store,)*
            "/* {below_out} {left_row} {stride} */",
            piece = inout(reg) $pieces.as_ptr() => _,
            count = inout(reg) $pieces.len() => _,
            left = out(reg) _,
            below = out(reg) _,
            right = out(reg) _,
            tiles = inout(reg) usize::from($add) => _,
            out = in(reg) $out,
            below_out = in(reg) $out.wrapping_add(TILE_ROWS * $stride),
            stride = in(reg) 4 * $stride,
            left_row = in(reg) 64usize,
            right_row = out(reg) _,
            right_tile = out(reg) _,
            left_tile = const LEFT_TILE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

block_kernel!(two_by_three and two_by_three_streaming,
    zero ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3" "tilezero tmm4" "tilezero tmm5"],
    load [
        "tileloadd tmm0, [{out} + {stride}]" "tileloadd tmm1, [{out} + {stride} + 64]"
        "tileloadd tmm2, [{out} + {stride} + 128]" "tileloadd tmm3, [{below_out} + {stride}]"
        "tileloadd tmm4, [{below_out} + {stride} + 64]" "tileloadd tmm5, [{below_out} + {stride} + 128]"
    ],
    step [
        "tileloadd tmm6, [{left} + {left_row}]"
        "tileloadd tmm7, [{right} + {right_row}]" "tdpbf16ps tmm0, tmm6, tmm7"
        "tileloadd tmm6, [{below} + {left_row}]" "tdpbf16ps tmm3, tmm6, tmm7"
        "tileloadd tmm7, [{right} + {right_row} + 64]" "tdpbf16ps tmm4, tmm6, tmm7"
        "tileloadd tmm6, [{left} + {left_row}]" "tdpbf16ps tmm1, tmm6, tmm7"
        "tileloadd tmm7, [{right} + {right_row} + 128]" "tdpbf16ps tmm2, tmm6, tmm7"
        "tileloadd tmm6, [{below} + {left_row}]" "tdpbf16ps tmm5, tmm6, tmm7"
    ],
    store [
        "tilestored [{out} + {stride}], tmm0" "tilestored [{out} + {stride} + 64], tmm1"
        "tilestored [{out} + {stride} + 128], tmm2" "tilestored [{below_out} + {stride}], tmm3"
        "tilestored [{below_out} + {stride} + 64], tmm4" "tilestored [{below_out} + {stride} + 128], tmm5"
    ]
);

block_kernel!(two_by_two,
    zero ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
    load [
        "tileloadd tmm0, [{out} + {stride}]" "tileloadd tmm1, [{out} + {stride} + 64]"
        "tileloadd tmm2, [{below_out} + {stride}]" "tileloadd tmm3, [{below_out} + {stride} + 64]"
    ],
    step [
        "tileloadd tmm4, [{left} + {left_row}]" "tileloadd tmm5, [{below} + {left_row}]"
        "tileloadd tmm6, [{right} + {right_row}]" "tileloadd tmm7, [{right} + {right_row} + 64]"
        "tdpbf16ps tmm0, tmm4, tmm6" "tdpbf16ps tmm2, tmm5, tmm6"
        "tdpbf16ps tmm1, tmm4, tmm7" "tdpbf16ps tmm3, tmm5, tmm7"
    ],
    store [
        "tilestored [{out} + {stride}], tmm0" "tilestored [{out} + {stride} + 64], tmm1"
        "tilestored [{below_out} + {stride}], tmm2" "tilestored [{below_out} + {stride} + 64], tmm3"
    ]
);

block_kernel!(two_by_one,
    zero ["tilezero tmm0" "tilezero tmm1"],
    load ["tileloadd tmm0, [{out} + {stride}]" "tileloadd tmm1, [{below_out} + {stride}]"],
    step [
        "tileloadd tmm4, [{left} + {left_row}]" "tileloadd tmm5, [{below} + {left_row}]"
        "tileloadd tmm6, [{right} + {right_row}]"
        "tdpbf16ps tmm0, tmm4, tmm6" "tdpbf16ps tmm1, tmm5, tmm6"
    ],
    store ["tilestored [{out} + {stride}], tmm0" "tilestored [{below_out} + {stride}], tmm1"]
);

block_kernel!(one_by_three and one_by_three_streaming,
    zero ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2"],
    load [
        "tileloadd tmm0, [{out} + {stride}]" "tileloadd tmm1, [{out} + {stride} + 64]"
        "tileloadd tmm2, [{out} + {stride} + 128]"
    ],
    step [
        "tileloadd tmm4, [{left} + {left_row}]" "tileloadd tmm5, [{right} + {right_row}]"
        "tileloadd tmm6, [{right} + {right_row} + 64]" "tileloadd tmm7, [{right} + {right_row} + 128]"
        "tdpbf16ps tmm0, tmm4, tmm5" "tdpbf16ps tmm1, tmm4, tmm6" "tdpbf16ps tmm2, tmm4, tmm7"
    ],
    store [
        "tilestored [{out} + {stride}], tmm0" "tilestored [{out} + {stride} + 64], tmm1"
        "tilestored [{out} + {stride} + 128], tmm2"
    ]
);

block_kernel!(one_by_two,
    zero ["tilezero tmm0" "tilezero tmm1"],
    load ["tileloadd tmm0, [{out} + {stride}]" "tileloadd tmm1, [{out} + {stride} + 64]"],
    step [
        "tileloadd tmm4, [{left} + {left_row}]" "tileloadd tmm5, [{right} + {right_row}]"
        "tileloadd tmm6, [{right} + {right_row} + 64]"
        "tdpbf16ps tmm0, tmm4, tmm5" "tdpbf16ps tmm1, tmm4, tmm6"
    ],
    store ["tilestored [{out} + {stride}], tmm0" "tilestored [{out} + {stride} + 64], tmm1"]
);

block_kernel!(one_by_one,
    zero ["tilezero tmm0"],
    load ["tileloadd tmm0, [{out} + {stride}]"],
    step [
        "tileloadd tmm4, [{left} + {left_row}]" "tileloadd tmm5, [{right} + {right_row}]"
        "tdpbf16ps tmm0, tmm4, tmm5"
    ],
    store ["tilestored [{out} + {stride}], tmm0"]
);

/// Sums on their way, where the block is smaller than its tiles.
#[repr(C, align(64))]
struct Edge {
    _sums: [f32; BLOCK_ROWS * COLUMNS],
}

/// The sum of all pieces' products, into `block`.
///
/// # Safety
/// Each piece has that many tiles on the left (below too, if the block has more than 16 rows) and 16 times as many pairs on the
/// right, of as many words as the block has columns, in whole tiles; the block's rows of `columns` floats are the caller's.
pub(crate) unsafe fn multiply(_: &Tiles, pieces: &[Piece], block: Block) {
    let Block {
        out,
        stride,
        rows,
        columns,
        add,
        streams,
    } = block;
    debug_assert!((1..=BLOCK_ROWS).contains(&rows) && (1..=COLUMNS).contains(&columns));
    let kernel = match (rows > TILE_ROWS, columns.div_ceil(TILE_ROWS)) {
        (true, 3) if streams => two_by_three_streaming,
        (true, 3) => two_by_three,
        (true, 2) => two_by_two,
        (true, _) => two_by_one,
        (false, 3) if streams => one_by_three_streaming,
        (false, 3) => one_by_three,
        (false, 2) => one_by_two,
        (false, _) => one_by_one,
    };
    if rows.is_multiple_of(TILE_ROWS) && columns.is_multiple_of(TILE_ROWS) {
        // SAFETY: the tiles are the block's rows and columns, which are the caller's.
        return unsafe { kernel(pieces, out, stride, add) };
    }
    let mut edge = MaybeUninit::<Edge>::uninit();
    let edge = edge.as_mut_ptr().cast::<f32>();
    for row in 0..if add { rows } else { 0 } {
        // SAFETY: a row of the caller's block; the edge has room for a block.
        unsafe {
            let to = edge.add(row * COLUMNS);
            std::ptr::copy_nonoverlapping(out.add(row * stride), to, columns);
        }
    }
    // SAFETY: the edge is as large as the largest block's tiles.
    unsafe { kernel(pieces, edge, COLUMNS, add) };
    for row in 0..rows {
        // SAFETY: as above.
        unsafe {
            let from = edge.add(row * COLUMNS);
            std::ptr::copy_nonoverlapping(from, out.add(row * stride), columns);
        }
    }
}
