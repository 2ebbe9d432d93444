//! Several bf16 products at once, each the sum of several: all the linear layers that read one input, each with its
//! low-rank update, in one parallel region and with one store an output.

use std::ops::Range;

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
};

use crate::amx;
use crate::bf16::available;
use crate::matmul::Store;
use crate::panels::{
    COLUMNS, ROWS, TILE_ROWS, first_lanes, left_words, packed_words, padded_pairs,
};
use crate::parallel::{EvenBlocks, SharedOut, for_each_block};
use crate::processor::{Processor, processor};

/// Rows of one task: its left panels stay in the second-level cache.
const TASK_ROWS: usize = 128;
/// Rows at which a task has fewer right panels, so many words of them.
const MOST_FEW_ROWS: usize = 64;
const TASK_WORDS: usize = 28 << 10;
/// Right panels of one task.
const TASK_PANELS: usize = 8;
/// Pairs summed in registers before the sums go to memory, a multiple of 16: a right panel of that depth is 192 KiB.
const RUN_PAIRS: usize = 1024;
/// The same with AMX, whose sums cost little to keep.
const RUN_PAIRS_AMX: usize = 2048;
/// Pairs at which two runs are faster with AMX, because half of a right panel (36 KiB) stays in the first-level cache while the
/// rows pass, and all of it would not. Three runs or more are slower than one.
const HALVED: std::ops::RangeInclusive<usize> = 193..=384;
/// Segments summed in registers at most.
const RUN_PIECES: usize = 6;

/// `left · right`: a packed operand times a stretch of the pairs of another.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    /// Packed by `pack_left`.
    pub(crate) left: &'a [f32],
    /// Panels of 48 columns.
    pub(crate) right: &'a [f32],
    /// Pairs of a panel of the right operand, and the first one that counts: a multiple of 16.
    pub(crate) right_pairs: (usize, usize),
    /// How many count: all of the left operand.
    pub(crate) pairs: usize,
}

impl<'a> Segment<'a> {
    /// The whole of two operands whose sums are `k` long.
    pub(crate) fn whole(left: &'a [f32], right: &'a [f32], k: usize) -> Self {
        Self {
            left,
            right,
            right_pairs: (padded_pairs(k), 0),
            pairs: k.div_ceil(2),
        }
    }

    /// Panics unless the operands have `rows` rows and `columns` columns.
    #[track_caller]
    fn check(&self, rows: usize, columns: usize) {
        let (right, first) = self.right_pairs;
        assert!(
            first.is_multiple_of(16) && first + self.left_pairs() <= right,
            "a segment reaches beyond its operands"
        );
        assert!(self.left.len() >= left_words(rows, 2 * self.pairs));
        assert!(self.right.len() >= packed_words::<COLUMNS>(columns, 2 * right));
    }

    /// Pairs of a panel of the left operand.
    fn left_pairs(&self) -> usize {
        padded_pairs(2 * self.pairs)
    }
}

/// `Σ segments`, into columns `out_column..out_column + columns` of the output.
pub(crate) struct Job<'a> {
    pub(crate) segments: &'a [Segment<'a>],
    pub(crate) columns: usize,
    pub(crate) out_column: usize,
}

/// A stretch of pairs: where its left and right panel of the tile begin, and how many.
#[derive(Clone, Copy)]
struct Piece {
    left: *const u32,
    right: *const u32,
    pairs: usize,
}

#[derive(Clone, Copy)]
struct Tile {
    out: *mut f32,
    stride: usize,
    columns: usize,
    add: bool,
    /// Whether the right panels are read from memory rather than from the caches, by the first rows.
    streams: bool,
}

/// Computes `jobs` into an output of `rows` rows, `stride` apart. The jobs' columns must not overlap.
///
/// The sum of an output element runs over the segments in their order, whatever the rows, the columns and the threads.
pub(crate) fn multiply_jobs(
    jobs: &[Job<'_>],
    rows: usize,
    out: &mut [f32],
    stride: usize,
    store: Store,
) {
    assert!(out.len() >= rows * stride);
    // SAFETY: the output has that many floats, which are this call's alone.
    unsafe { multiply_jobs_at(jobs, rows, SharedOut::new(out), stride, store) };
}

/// [`multiply_jobs`] into memory that with [`Store::Replace`] need not be initialised. All of the jobs' columns are written.
///
/// # Safety
/// `out` has `rows * stride` floats, which nobody else touches meanwhile.
pub(crate) unsafe fn multiply_jobs_at(
    jobs: &[Job<'_>],
    rows: usize,
    out: SharedOut,
    stride: usize,
    store: Store,
) {
    assert!(available(), "bf16 instructions are missing");
    let mut panels = Vec::new();
    let mut work = 0;
    for (index, job) in jobs.iter().enumerate() {
        assert!(job.out_column + job.columns <= stride);
        for segment in job.segments {
            segment.check(rows, job.columns);
            work += rows * job.columns * segment.pairs;
        }
        panels.extend((0..job.columns.div_ceil(COLUMNS)).map(|panel| (index, panel)));
    }
    if rows == 0 || panels.is_empty() {
        return;
    }
    let threads = rayon::current_num_threads();
    let with_tiles = processor() == Processor::Amx;
    // Of many rows each thread takes its own, and of few its own panels: two threads must end together.
    let is_tall = rows >= threads * MOST_FEW_ROWS && rows > TASK_ROWS;
    let [row_threads, panel_threads] = if is_tall { [threads, 1] } else { [1, threads] };
    let row_tasks = EvenBlocks::new(rows, row_unit(processor()), TASK_ROWS, row_threads);
    let task_panels = match rows <= MOST_FEW_ROWS {
        // Few rows are bound by reading the panels, and a layer has few of them.
        true => (TASK_WORDS * rows * panels.len() / work.max(1)).clamp(1, TASK_PANELS),
        false => TASK_PANELS,
    };
    let panel_tasks = EvenBlocks::new(panels.len(), 1, task_panels, panel_threads);
    for_each_block(row_tasks.len() * panel_tasks.len(), 1, work, |tasks| {
        // SAFETY: this is AMX's path.
        let tiles = with_tiles.then(|| unsafe { amx::Tiles::configure() });
        for task in tasks {
            let task_rows = row_tasks.get(task / panel_tasks.len());
            for &(job, panel) in &panels[panel_tasks.get(task % panel_tasks.len())] {
                let job = &jobs[job];
                let column = panel * COLUMNS;
                // SAFETY: the features and the operands' lengths were asserted above; the tiles lie inside `out`, and
                // this task alone has their rows and columns.
                unsafe {
                    let tile = Tile {
                        out: out.at(job.out_column + column),
                        stride,
                        columns: COLUMNS.min(job.columns - column),
                        add: store == Store::Add,
                        streams: rows <= MOST_FEW_ROWS,
                    };
                    multiply_panel(
                        job.segments,
                        column,
                        task_rows.clone(),
                        tile,
                        tiles.as_ref(),
                    );
                }
            }
        }
    });
}

/// Rows that blocks of a product are made of: as many as `path` multiplies together, and no fewer than are packed together.
pub(crate) fn row_unit(path: Processor) -> usize {
    match path {
        Processor::Amx => amx::BLOCK_ROWS,
        _ => TILE_ROWS,
    }
}

/// Products of blocks of rows on the calling thread, while it lives. Not to be held across a wait for other tasks, which would
/// drop the tile registers' shape.
pub(crate) struct Multiplier {
    path: Processor,
    tiles: Option<amx::Tiles>,
}

impl Multiplier {
    /// With what `path`, [`processor`]'s answer on the thread that cut the blocks, has.
    pub(crate) fn on(path: Processor) -> Self {
        assert!(available() && path >= Processor::Avx512 && path <= processor());
        Self {
            path,
            // SAFETY: this is AMX's path.
            tiles: (path == Processor::Amx).then(|| unsafe { amx::Tiles::configure() }),
        }
    }

    /// What the left operands must be packed for.
    pub(crate) fn path(&self) -> Processor {
        self.path
    }

    /// Columns `columns` of `Σ segments`, the first of which begins a panel, into rows of `out` that are `stride` apart.
    ///
    /// An element is, bit for bit, that of [`multiply_jobs`].
    pub(crate) fn multiply(
        &self,
        segments: &[Segment<'_>],
        rows: usize,
        columns: Range<usize>,
        out: &mut [f32],
        stride: usize,
    ) {
        if rows == 0 || columns.is_empty() {
            return;
        }
        assert!(columns.start.is_multiple_of(COLUMNS) && columns.len() <= stride);
        assert!(out.len() >= (rows - 1) * stride + columns.len());
        segments
            .iter()
            .for_each(|segment| segment.check(rows, columns.end));
        for column in columns.clone().step_by(COLUMNS) {
            let tile = Tile {
                out: out[column - columns.start..].as_mut_ptr(),
                stride,
                columns: COLUMNS.min(columns.end - column),
                add: false,
                streams: false,
            };
            // SAFETY: the features and the operands' lengths were asserted; the tile lies inside `out`, which is borrowed
            // mutably.
            unsafe { multiply_panel(segments, column, 0..rows, tile, self.tiles.as_ref()) };
        }
    }
}

/// All rows of a task against one right panel of every segment; `tile` is at row 0.
///
/// # Safety
/// As for [`multiply_tile`], for every tile of the rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply_panel(
    segments: &[Segment<'_>],
    column: usize,
    rows: Range<usize>,
    mut tile: Tile,
    tiles: Option<&amx::Tiles>,
) {
    let mut run = [(0, 0, 0); RUN_PIECES];
    let most = match tiles {
        Some(_) => {
            let pairs: usize = segments.iter().map(Segment::left_pairs).sum();
            match HALVED.contains(&pairs) {
                true => pairs.div_ceil(2).next_multiple_of(16),
                false => RUN_PAIRS_AMX,
            }
        }
        None => RUN_PAIRS,
    };
    let (mut pieces, mut depth, mut at) = (0, 0, (0, 0));
    loop {
        // Cut the segments into runs that one tile sums in registers.
        let (segment, first) = at;
        let exhausted = segment == segments.len();
        if exhausted || depth >= most || pieces == RUN_PIECES {
            if depth > 0 || !tile.add {
                let run = &run[..pieces];
                // SAFETY: passed on to the caller.
                unsafe {
                    match tiles {
                        Some(tiles) => {
                            multiply_run_amx(tiles, segments, run, column, rows.clone(), tile);
                        }
                        None => multiply_run(segments, run, column, rows.clone(), tile),
                    }
                }
                tile.add = true;
            }
            (pieces, depth) = (0, 0);
            if exhausted {
                return;
            }
        }
        let take = (segments[segment].pairs - first).min(most - depth);
        if take > 0 {
            run[pieces] = (segment, first, take);
            pieces += 1;
            depth += take.next_multiple_of(16);
        }
        at = if first + take == segments[segment].pairs {
            (segment + 1, 0)
        } else {
            (segment, first + take)
        };
    }
}

/// # Safety
/// As for [`multiply_panel`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply_run(
    segments: &[Segment<'_>],
    run: &[(usize, usize, usize)],
    column: usize,
    rows: Range<usize>,
    tile: Tile,
) {
    let mut pieces = [Piece {
        left: std::ptr::null(),
        right: std::ptr::null(),
        pairs: 0,
    }; RUN_PIECES];
    for row in rows.clone().step_by(ROWS) {
        for (piece, &(segment, first, pairs)) in pieces.iter_mut().zip(run) {
            let Segment {
                left,
                right,
                right_pairs,
                ..
            } = segments[segment];
            let left_pairs = segments[segment].left_pairs();
            // SAFETY: `multiply_jobs` asserted that the panels of `row` and `column` lie inside the operands, with
            // `first + pairs` pairs behind the segment's beginning.
            *piece = unsafe {
                Piece {
                    left: left
                        .as_ptr()
                        .cast::<u32>()
                        .add(row * left_pairs + first * ROWS),
                    right: right
                        .as_ptr()
                        .cast::<u32>()
                        .add(column * right_pairs.0 + (right_pairs.1 + first) * COLUMNS),
                    pairs,
                }
            };
        }
        // SAFETY: the tile's rows are the caller's.
        unsafe {
            let tile = Tile {
                out: tile.out.add(row * tile.stride),
                ..tile
            };
            let pieces = &pieces[..run.len()];
            let rows = rows.end - row;
            // Fewer columns than a panel has: those of a low-rank factor, or the last.
            match tile.columns.div_ceil(16) {
                1 => multiply_rows::<1>(pieces, rows, tile),
                2 => multiply_rows::<2>(pieces, rows, tile),
                _ => multiply_rows::<3>(pieces, rows, tile),
            }
        }
    }
}

/// At most 8 of so many rows times `V` vectors of columns.
///
/// # Safety
/// As for [`multiply_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply_rows<const V: usize>(pieces: &[Piece], rows: usize, tile: Tile) {
    // SAFETY: passed on to the caller.
    unsafe {
        match rows {
            1 => multiply_tile::<1, V>(pieces, tile),
            2 => multiply_tile::<2, V>(pieces, tile),
            3 => multiply_tile::<3, V>(pieces, tile),
            4 => multiply_tile::<4, V>(pieces, tile),
            5 => multiply_tile::<5, V>(pieces, tile),
            6 => multiply_tile::<6, V>(pieces, tile),
            7 => multiply_tile::<7, V>(pieces, tile),
            _ => multiply_tile::<8, V>(pieces, tile),
        }
    }
}

/// The same with AMX: blocks of 32 rows.
///
/// # Safety
/// As for [`multiply_panel`].
unsafe fn multiply_run_amx(
    tiles: &amx::Tiles,
    segments: &[Segment<'_>],
    run: &[(usize, usize, usize)],
    column: usize,
    rows: Range<usize>,
    tile: Tile,
) {
    let mut pieces = [amx::Piece::NONE; RUN_PIECES];
    for row in rows.clone().step_by(amx::BLOCK_ROWS) {
        let block_rows = amx::BLOCK_ROWS.min(rows.end - row);
        for (piece, &(segment, first, pairs)) in pieces.iter_mut().zip(run) {
            let segment = &segments[segment];
            let (left_pairs, right_pairs) = (segment.left_pairs(), segment.right_pairs);
            // SAFETY: `multiply_jobs` asserted that the panels of `row` and `column` lie inside the operands, with
            // `first + pairs` pairs, rounded up to tiles, behind the segment's beginning.
            *piece = unsafe {
                let left = segment.left.as_ptr().cast::<u32>();
                let left = left.add(row * left_pairs + first * TILE_ROWS);
                let below = match block_rows > TILE_ROWS {
                    true => left.add(TILE_ROWS * left_pairs),
                    false => left,
                };
                let right = segment.right.as_ptr().cast::<u32>();
                let right = right.add(column * right_pairs.0 + (right_pairs.1 + first) * COLUMNS);
                amx::Piece {
                    left,
                    below,
                    right,
                    right_row: 4 * COLUMNS,
                    tiles: pairs.div_ceil(16),
                }
            };
        }
        // SAFETY: the block's rows are the caller's.
        unsafe {
            let block = amx::Block {
                out: tile.out.add(row * tile.stride),
                stride: tile.stride,
                rows: block_rows,
                columns: tile.columns,
                add: tile.add,
                streams: tile.streams && row == rows.start,
            };
            amx::multiply(tiles, &pieces[..run.len()], block);
        }
    }
}

/// `R` rows times `V` vectors of columns over all pieces.
///
/// # Safety
/// Each piece has `pairs` times 8 words on the left and `pairs` times 48 on the right; the tile's `R` rows of `columns` floats, of
/// which `V` vectors are enough, are the caller's.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply_tile<const R: usize, const V: usize>(pieces: &[Piece], tile: Tile) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for piece in pieces {
        for pair in 0..piece.pairs {
            // SAFETY: pair < pairs and V <= 3, so the `V` vectors and `R` words lie inside the panels.
            unsafe {
                let right = piece.right.add(pair * COLUMNS);
                let columns: [__m512bh; V] = std::array::from_fn(|vector| {
                    let words = _mm512_loadu_si512(right.add(16 * vector).cast());
                    std::mem::transmute::<__m512i, __m512bh>(words)
                });
                for (row, sums) in sums.iter_mut().enumerate() {
                    let word = *piece.left.add(pair * ROWS + row);
                    let word = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(
                        word.cast_signed(),
                    ));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, word, column);
                    }
                }
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (vector, &sum) in sums.iter().enumerate() {
            let mask = first_lanes(tile.columns.saturating_sub(16 * vector));
            // SAFETY: the mask stops at the tile's last column; what is masked off may be out of bounds, hence the
            // wrapping addition.
            unsafe {
                let at = tile.out.wrapping_add(row * tile.stride + 16 * vector);
                let before = if tile.add { mask } else { 0 };
                let sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(before, at));
                _mm512_mask_storeu_ps(at, mask, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests;
