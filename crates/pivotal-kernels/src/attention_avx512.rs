//! What the vector path of attention is made of: lanes are query rows, and everything else runs down the lanes.
//!
//! A block of 48 rows (queries times the heads that share a key head) fills three vectors. Scores are held transposed,
//! `[keys, 48]`, so that softmax goes lane by lane without a horizontal step and the probabilities come out in the layout that
//! the next product wants. An operand is made of words: an f32, or (`BF16`) a pair of bf16 consecutive along the sum.
//!
//! Every lane is computed by the same instructions whatever the other lanes hold.

use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, _CMP_NLT_UQ, _MM_FROUND_NO_EXC,
    _MM_FROUND_TO_NEAREST_INT, _mm256_storeu_si256, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_maskz_scalef_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_permutexvar_epi16,
    _mm512_roundscale_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    _mm512_sub_ps,
};

use crate::amx::Tiles;
use crate::attention_amx;
use crate::parallel::{SharedOut, for_each_block};
use crate::plan::{AttentionPlan, AttentionShape};

/// Keys whose scores are held at a time: 12 KiB of them, so that they stay in the first-level cache.
pub(crate) const TILE: usize = 64;
/// Lanes of a vector.
pub(crate) const VECTOR: usize = 16;

/// Elements in a word.
pub(crate) const fn elements(bf16: bool) -> usize {
    if bf16 { 2 } else { 1 }
}

/// Floats of a row of `head_dim` in whole vectors.
pub(crate) fn padded(shape: AttentionShape) -> usize {
    shape.head_dim.next_multiple_of(VECTOR)
}

/// Cuts `len` floats, rounded up to whole vectors, off the front of `rest`.
pub(crate) fn cut<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, back) = std::mem::take(rest).split_at_mut(len.next_multiple_of(VECTOR));
    *rest = back;
    front
}

/// A mask of the first `count` of 16 lanes.
pub(crate) fn first_lanes(count: usize) -> u16 {
    if count >= VECTOR {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}

/// The first 16 floats of `from`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub(crate) fn load(from: &[f32]) -> __m512 {
    let from = &from[..VECTOR];
    // SAFETY: sixteen floats are readable; the load needs no alignment.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

/// Up to 16 floats of `from`, zeros after its end.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub(crate) fn load_part(from: &[f32]) -> __m512 {
    // SAFETY: the mask stops at the end of `from`.
    unsafe { _mm512_maskz_loadu_ps(first_lanes(from.len()), from.as_ptr()) }
}

/// Writes the first 16 floats of `to`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub(crate) fn store(value: __m512, to: &mut [f32]) {
    let to = &mut to[..VECTOR];
    // SAFETY: sixteen floats are writable; the store needs no alignment.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
}

/// Writes up to 16 floats, to the end of `to`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub(crate) fn store_part(value: __m512, to: &mut [f32]) {
    // SAFETY: the mask stops at the end of `to`.
    unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), first_lanes(to.len()), value) }
}

/// Words whose low halves are `even` and whose high halves are `odd`, rounded to bf16, lane by lane.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub(crate) fn interleave(even: __m512, odd: __m512) -> __m512 {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut lane = 0;
        while lane < 16 {
            order[2 * lane] = lane as u16;
            order[2 * lane + 1] = 16 + lane as u16;
            lane += 1;
        }
        order
    };
    // SAFETY: 32 words of 16 bits are one vector.
    let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
    let both = bits(_mm512_cvtne2ps_pbh(odd, even));
    _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub(crate) fn bits(pairs: __m512bh) -> __m512i {
    // SAFETY: both are 512 bits, and every pattern is valid.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(pairs) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn pairs(bits: __m512) -> __m512bh {
    // SAFETY: as above.
    unsafe { std::mem::transmute::<__m512, __m512bh>(bits) }
}

/// `2^x` to about two units in the last place; exactly 0 below -126 (so that a masked -inf weighs nothing), NaN for NaN.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
#[expect(
    clippy::excessive_precision,
    reason = "the published constants of Cephes' exp2f"
)]
pub(crate) fn exp2(x: __m512) -> __m512 {
    let smallest = _mm512_set1_ps(-126.0);
    let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, smallest);
    // The second operand is returned where one is NaN.
    let x = _mm512_max_ps(smallest, x);
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let rest = _mm512_sub_ps(x, whole);
    let mut series = _mm512_set1_ps(1.535_336_188_319_5e-4);
    for coefficient in [
        1.339_887_440_266_574e-3,
        9.618_437_357_674_64e-3,
        5.550_332_471_162_809e-2,
        2.402_264_791_363_012e-1,
        6.931_472_028_550_421e-1,
        1.0,
    ] {
        series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(coefficient));
    }
    _mm512_maskz_scalef_ps(keep, series, whole)
}

/// Rounds 16 lanes to bf16: eight words.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub(crate) fn round_lanes(lanes: __m512, to: &mut [f32]) {
    let to = &mut to[..VECTOR / 2];
    // SAFETY: both are 256 bits, every pattern is valid, and eight floats are writable without alignment.
    unsafe {
        let words = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(lanes));
        _mm256_storeu_si256(to.as_mut_ptr().cast(), words);
    }
}

/// The left operand of a product: word (row, step) lies at `row * row_stride + step * step_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) words: &'a [f32],
    pub(crate) row: usize,
    pub(crate) step: usize,
}

/// The right operand: words of all columns for each step of the sum, `step` apart.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) words: &'a [f32],
    pub(crate) step: usize,
}

/// The sizes of a product; `columns` is in whole vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) steps: usize,
}

/// `out (+)= left · right`, with tiles where there are some (heads too large for `attention_amx_rows`); rows of `out` are `stride`
/// apart. Without them an element's sum runs over the steps in ascending order.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) fn product<const BF16: bool>(
    tiles: Option<&Tiles>,
    left: Left<'_>,
    right: Right<'_>,
    size: Size,
    (out, stride): (&mut [f32], usize),
    add: bool,
) {
    let Size {
        rows,
        columns,
        steps,
    } = size;
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns.is_multiple_of(VECTOR) && out.len() >= (rows - 1) * stride + columns);
    if steps > 0 {
        assert!(left.words.len() > (rows - 1) * left.row + (steps - 1) * left.step);
        assert!(right.words.len() >= (steps - 1) * right.step + columns);
    }
    if let Some(tiles) = tiles.filter(|_| BF16 && attention_amx::takes(size)) {
        return attention_amx::product(tiles, left, right, size, (out, stride), add);
    }
    let mut column = 0;
    while column < columns {
        let vectors = (columns - column) / VECTOR;
        let panel = Panel {
            left: left.words.as_ptr().cast(),
            row: left.row,
            step: left.step,
            right: right.words.as_ptr().wrapping_add(column),
            right_step: right.step,
            steps,
            out: out.as_mut_ptr().wrapping_add(column),
            stride,
            add,
        };
        // SAFETY: the assertions above keep every word and every sum of the panel inside its slice.
        unsafe {
            match vectors {
                1 => panel_rows::<BF16, 8, 1>(panel, rows),
                2 => panel_rows::<BF16, 8, 2>(panel, rows),
                3 => panel_rows::<BF16, 8, 3>(panel, rows),
                _ => panel_rows::<BF16, 6, 4>(panel, rows),
            }
        }
        column += vectors.min(4) * VECTOR;
    }
}

/// A product of a few whole vectors of columns.
#[derive(Clone, Copy)]
struct Panel {
    left: *const i32,
    row: usize,
    step: usize,
    right: *const f32,
    right_step: usize,
    steps: usize,
    out: *mut f32,
    stride: usize,
    add: bool,
}

/// # Safety
/// The panel's words and sums for `rows` rows and `V` vectors are inside their slices.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn panel_rows<const BF16: bool, const R: usize, const V: usize>(
    mut panel: Panel,
    rows: usize,
) {
    let mut left = rows;
    // SAFETY: passed on to the caller; each call takes the rows after those before.
    unsafe {
        while left >= R {
            tile::<BF16, R, V>(panel);
            panel.left = panel.left.wrapping_add(R * panel.row);
            panel.out = panel.out.wrapping_add(R * panel.stride);
            left -= R;
        }
        match left {
            0 => {}
            1 => tile::<BF16, 1, V>(panel),
            2 => tile::<BF16, 2, V>(panel),
            3 => tile::<BF16, 3, V>(panel),
            4 => tile::<BF16, 4, V>(panel),
            5 => tile::<BF16, 5, V>(panel),
            6 => tile::<BF16, 6, V>(panel),
            _ => tile::<BF16, 7, V>(panel),
        }
    }
}

/// # Safety
/// The panel's words and sums for `R` rows and `V` vectors are inside their slices.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile<const BF16: bool, const R: usize, const V: usize>(panel: Panel) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: by the caller's promise.
    unsafe {
        let (mut left, mut right) = (panel.left, panel.right);
        for _ in 0..panel.steps {
            let mut columns = [_mm512_setzero_ps(); V];
            for (vector, column) in columns.iter_mut().enumerate() {
                *column = _mm512_loadu_ps(right.add(vector * VECTOR));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let word = _mm512_castsi512_ps(_mm512_set1_epi32(*left.add(row * panel.row)));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = if BF16 {
                        _mm512_dpbf16_ps(*sum, pairs(word), pairs(column))
                    } else {
                        _mm512_fmadd_ps(word, column, *sum)
                    };
                }
            }
            left = left.wrapping_add(panel.step);
            right = right.wrapping_add(panel.right_step);
        }
        for (row, sums) in sums.iter().enumerate() {
            for (vector, &sum) in sums.iter().enumerate() {
                let at = panel.out.add(row * panel.stride + vector * VECTOR);
                let sum = if panel.add {
                    _mm512_add_ps(sum, _mm512_loadu_ps(at))
                } else {
                    sum
                };
                _mm512_storeu_ps(at, sum);
            }
        }
    }
}

/// Keys or values of all heads as operands, in words.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    words: &'a [f32],
    /// Words between heads, and between tokens (sums over `head_dim`) or steps (sums over tokens).
    head: usize,
    token: usize,
}

impl<'a> Operand<'a> {
    /// f32 operands are the matrix itself.
    pub(crate) fn f32(shape: AttentionShape, matrix: &'a [f32]) -> Self {
        Self {
            words: matrix,
            head: shape.head_dim,
            token: shape.key_width(),
        }
    }

    /// Rows are tokens from `token` on; the sum runs over `head_dim`.
    pub(crate) fn rows(self, head: usize, token: usize) -> Left<'a> {
        Left {
            words: &self.words[head * self.head + token * self.token..],
            row: self.token,
            step: 1,
        }
    }

    /// Rows are elements of the head; the sum runs over tokens (or pairs of them) from `step` on.
    pub(crate) fn columns(self, head: usize, step: usize) -> Left<'a> {
        Left {
            words: &self.words[head * self.head + step * self.token..],
            row: 1,
            step: self.token,
        }
    }
}

/// Words of [`pack_rows`].
pub(crate) fn row_words(plan: &AttentionPlan) -> usize {
    plan.tokens() * plan.shape().kv_heads * plan.shape().head_dim.div_ceil(2)
}

/// Words of [`pack_pairs`].
pub(crate) fn pair_words(plan: &AttentionPlan) -> usize {
    plan.pairs() * plan.shape().key_width()
}

/// Rounds `[tokens, kv_heads * head_dim]` to bf16, pairs along `head_dim`: `[kv_heads, tokens, head_dim / 2]`.
pub(crate) fn pack_rows<'a>(
    plan: &AttentionPlan,
    matrix: &[f32],
    words: &'a mut [f32],
) -> Operand<'a> {
    let (shape, tokens) = (plan.shape(), plan.tokens());
    let (dim, pairs) = (shape.head_dim, shape.head_dim.div_ceil(2));
    assert_eq!(words.len(), row_words(plan));
    let target = SharedOut::new(words);
    for_each_block(tokens, 64, tokens * shape.key_width(), |tokens_here| {
        for token in tokens_here {
            for head in 0..shape.kv_heads {
                let from = &matrix[token * shape.key_width() + head * dim..][..dim];
                // SAFETY: this block alone has the words of these tokens; the features were found when the plan was made.
                unsafe {
                    round_row(
                        from,
                        1.0,
                        target.slice((head * tokens + token) * pairs, pairs),
                    )
                };
            }
        }
    });
    Operand {
        words,
        head: tokens * pairs,
        token: pairs,
    }
}

/// Rounds `scale · from` to bf16, two elements a word.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) fn round_row(from: &[f32], scale: f32, to: &mut [f32]) {
    let scale = _mm512_set1_ps(scale);
    for (from, to) in from.chunks(2 * VECTOR).zip(to.chunks_mut(VECTOR)) {
        let (low, high) = from.split_at(from.len().min(VECTOR));
        let [low, high] = [low, high].map(|part| _mm512_mul_ps(load_part(part), scale));
        let words = bits(_mm512_cvtne2ps_pbh(high, low));
        store_part(_mm512_castsi512_ps(words), to);
    }
}

/// Rounds `[tokens, kv_heads * head_dim]` to bf16, pairs along the tokens of each piece: `[pairs, kv_heads * head_dim]`.
pub(crate) fn pack_pairs<'a>(
    plan: &AttentionPlan,
    matrix: &[f32],
    words: &'a mut [f32],
) -> Operand<'a> {
    let (width, dim) = (plan.shape().key_width(), plan.shape().head_dim);
    assert_eq!(words.len(), pair_words(plan));
    let target = SharedOut::new(words);
    let work = plan.tokens() * width;
    for_each_block(plan.pieces.len(), 1, work, |pieces| {
        for piece in &plan.pieces[pieces] {
            for pair in 0..piece.len.div_ceil(2) {
                let even = &matrix[(piece.start + 2 * pair) * width..][..width];
                let odd = if 2 * pair + 1 < piece.len {
                    &matrix[(piece.start + 2 * pair + 1) * width..][..width]
                } else {
                    &[]
                };
                // SAFETY: this block alone has the words of this piece; the features were found when the plan was made.
                unsafe { pair_rows(even, odd, target.slice((piece.pair + pair) * width, width)) };
            }
        }
    });
    Operand {
        words,
        head: dim,
        token: width,
    }
}

/// Words of two rows; the second may be shorter, zeros after its end.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) fn pair_rows(even: &[f32], odd: &[f32], to: &mut [f32]) {
    for (at, to) in to.chunks_mut(VECTOR).enumerate() {
        let at = at * VECTOR;
        let even = load_part(&even[at..even.len().min(at + VECTOR)]);
        let odd = load_part(&odd[at.min(odd.len())..odd.len().min(at + VECTOR)]);
        store_part(interleave(even, odd), to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_agree_with_f64() {
        if !crate::bf16::available() {
            return;
        }
        let power = |x: f32| {
            let mut out = [0.0; VECTOR];
            // SAFETY: the features are there.
            unsafe { store(exp2(_mm512_set1_ps(x)), &mut out) };
            out[7]
        };
        for step in -12_599..=3000 {
            let x = step as f32 / 100.0;
            let error = (f64::from(power(x)) / f64::from(x).exp2() - 1.0).abs();
            // Two units in the last place.
            assert!(error < 2.4e-7, "2^{x} is off by {error}");
        }
        assert_eq!(power(0.0), 1.0);
        assert_eq!(power(f32::NEG_INFINITY), 0.0);
        assert_eq!(power(-127.0), 0.0);
        assert!(power(f32::NAN).is_nan());
    }
}
