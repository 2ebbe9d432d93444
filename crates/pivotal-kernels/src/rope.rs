//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the rotate-half convention of Hugging Face's Llama:
//! element `i` of a head is rotated with element `i + head_dim/2`.

use crate::parallel::{SharedOut, check_matrix, for_each_block, rows_per_block, written};
use crate::plan::AttentionShape;

/// The cosines and sines of some tokens' positions, computed once for all layers.
#[derive(Clone, Debug)]
pub struct RopeTable {
    half: usize,
    tokens: usize,
    /// `[tokens, head_dim]`: the cosines of a token, then its sines.
    values: Vec<f32>,
}

impl RopeTable {
    /// Tables for tokens at `positions`. `inverse_frequencies` has `head_dim / 2` elements, already scaled for long contexts;
    /// `attention_scale` (1 for most models) multiplies both tables, as `YaRN` wants it.
    ///
    /// The angle is an f32 product, as Hugging Face computes it.
    #[must_use]
    pub fn new(inverse_frequencies: &[f32], positions: &[usize], attention_scale: f32) -> Self {
        let half = inverse_frequencies.len();
        let mut values = Vec::with_capacity(positions.len() * 2 * half);
        for &position in positions {
            let angle = |frequency: &f32| f64::from(frequency * position as f32);
            let scale = f64::from(attention_scale);
            values.extend(
                inverse_frequencies
                    .iter()
                    .map(|f| (angle(f).cos() * scale) as f32),
            );
            values.extend(
                inverse_frequencies
                    .iter()
                    .map(|f| (angle(f).sin() * scale) as f32),
            );
        }
        Self {
            half,
            tokens: positions.len(),
            values,
        }
    }

    /// Elements of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Tokens the table covers.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Rotates every head of `x` in place.
    ///
    /// # Shapes
    /// `x` is `[tokens, heads * head_dim]`.
    ///
    /// # Panics
    /// If `x` has another length.
    ///
    /// # Examples
    /// ```
    /// use pivotal_kernels::RopeTable;
    /// // A quarter turn of one head of two elements.
    /// let table = RopeTable::new(&[std::f32::consts::FRAC_PI_2], &[0, 1], 1.0);
    /// let mut x = [1.0, 0.0, 1.0, 0.0];
    /// table.apply(&mut x, 1);
    /// assert_eq!(x[..2], [1.0, 0.0]);
    /// assert!(x[2].abs() < 1e-6 && x[3] == 1.0);
    /// ```
    pub fn apply(&self, x: &mut [f32], heads: usize) {
        self.rotate(x, heads, 1.0);
    }

    /// The transpose of [`RopeTable::apply`], in place: what takes the gradient of its output to that of its input, and its
    /// inverse where `attention_scale` is 1.
    ///
    /// # Shapes
    /// `x` is `[tokens, heads * head_dim]`.
    ///
    /// # Panics
    /// If `x` has another length.
    pub fn apply_transpose(&self, x: &mut [f32], heads: usize) {
        self.rotate(x, heads, -1.0);
    }

    /// Takes rows of query, key and value apart and rotates the first two: `[tokens, heads * head_dim]`, and twice
    /// `[tokens, kv_heads * head_dim]`.
    ///
    /// # Shapes
    /// `joined` is `[tokens, (heads + 2 * kv_heads) * head_dim]`.
    ///
    /// # Panics
    /// If `joined` has another length, or the heads are not the table's.
    #[must_use]
    pub fn split(&self, joined: &[f32], shape: AttentionShape) -> [Vec<f32>; 3] {
        let tokens = self.tokens;
        self.joined_width(joined, shape);
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let (mut k, mut v) = (Vec::new(), Vec::new());
        // SAFETY: every row of the three is written, and they have the lengths that are wanted.
        let q = unsafe {
            written(tokens * queries, |q| {
                k = written(tokens * keys, |k| {
                    v = written(tokens * keys, |v| self.split_at(joined, shape, [q, k, v]));
                });
            })
        };
        [q, k, v]
    }

    /// [`RopeTable::split`] into memory that is there.
    ///
    /// # Shapes
    /// `joined` and `parts` as [`RopeTable::split`] takes and returns them.
    ///
    /// # Panics
    /// If a slice has another length, or the heads are not the table's.
    pub fn split_into(&self, joined: &[f32], shape: AttentionShape, parts: [&mut [f32]; 3]) {
        self.joined_width(joined, shape);
        let widths = [shape.query_width(), shape.key_width(), shape.key_width()];
        for (part, width) in parts.iter().zip(widths) {
            check_matrix("a part", part, self.tokens, width);
        }
        // SAFETY: the parts are borrowed mutably and have the lengths that were checked.
        unsafe { self.split_at(joined, shape, parts.map(SharedOut::new)) };
    }

    /// Writes every row of query, key and value.
    ///
    /// # Safety
    /// `joined` and the parts have a row a token; nobody else touches the parts meanwhile.
    unsafe fn split_at(&self, joined: &[f32], shape: AttentionShape, [q, k, v]: [SharedOut; 3]) {
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let width = shape.joined_width();
        let work = 3 * joined.len();
        for_each_block(self.tokens, rows_per_block(width), work, |block| {
            for token in block {
                let (from, rest) = joined[token * width..][..width].split_at(queries);
                let (key, value) = rest.split_at(keys);
                // SAFETY: row `token` of each part is this block's own.
                unsafe {
                    self.turn(token, from, q.slice(token * queries, queries), 1.0);
                    self.turn(token, key, k.slice(token * keys, keys), 1.0);
                    v.slice(token * keys, keys).copy_from_slice(value);
                }
            }
        });
    }

    /// The transpose of [`RopeTable::split`]: the gradient of its input where `parts` are those of its outputs.
    ///
    /// # Shapes
    /// `parts` as [`RopeTable::split`] returns them.
    ///
    /// # Panics
    /// If a part has another length.
    #[must_use]
    pub fn join(&self, parts: [&[f32]; 3], shape: AttentionShape) -> Vec<f32> {
        let (queries, keys) = (shape.query_width(), shape.key_width());
        for (part, width) in parts.into_iter().zip([queries, keys, keys]) {
            check_matrix("a part", part, self.tokens, width);
        }
        let width = shape.joined_width();
        let [q, k, v] = parts;
        let body = |joined: SharedOut| {
            let work = 3 * self.tokens * width;
            for_each_block(self.tokens, rows_per_block(width), work, |block| {
                for token in block {
                    // SAFETY: row `token` is this block's own.
                    let row = unsafe { joined.slice(token * width, width) };
                    let (query, rest) = row.split_at_mut(queries);
                    let (key, value) = rest.split_at_mut(keys);
                    self.turn(token, &q[token * queries..][..queries], query, -1.0);
                    self.turn(token, &k[token * keys..][..keys], key, -1.0);
                    value.copy_from_slice(&v[token * keys..][..keys]);
                }
            });
        };
        // SAFETY: the body writes every row.
        unsafe { written(self.tokens * width, body) }
    }

    #[track_caller]
    pub(crate) fn joined_width(&self, joined: &[f32], shape: AttentionShape) -> usize {
        assert!(
            shape.head_dim == self.head_dim(),
            "heads of {} are not the table's",
            shape.head_dim
        );
        let width = shape.joined_width();
        check_matrix("joined", joined, self.tokens, width);
        width
    }

    /// The cosines and the sines of a token.
    pub(crate) fn angles(&self, token: usize) -> (&[f32], &[f32]) {
        self.values[token * 2 * self.half..][..2 * self.half].split_at(self.half)
    }

    /// The heads of one token, rotated.
    pub(crate) fn turn(&self, token: usize, from: &[f32], to: &mut [f32], direction: f32) {
        let half = self.half;
        let (cosines, sines) = self.angles(token);
        let heads = from
            .chunks_exact(2 * half)
            .zip(to.chunks_exact_mut(2 * half));
        for (from, to) in heads {
            let ((a, b), (first, second)) = (from.split_at(half), to.split_at_mut(half));
            for index in 0..half {
                let angle = (cosines[index], sines[index] * direction);
                (first[index], second[index]) = rotated(a[index], b[index], angle);
            }
        }
    }

    fn rotate(&self, x: &mut [f32], heads: usize, direction: f32) {
        let (half, width) = (self.half, heads * self.head_dim());
        check_matrix("x", x, self.tokens, width);
        if width == 0 {
            return;
        }
        let len = x.len();
        let target = SharedOut::new(x);
        for_each_block(self.tokens, rows_per_block(width), 3 * len, |tokens| {
            for token in tokens {
                let (cosines, sines) = self.angles(token);
                // SAFETY: row `token` is this block's own.
                let row = unsafe { target.slice(token * width, width) };
                for head in row.chunks_exact_mut(2 * half) {
                    let (first, second) = head.split_at_mut(half);
                    for index in 0..half {
                        let angle = (cosines[index], sines[index] * direction);
                        (first[index], second[index]) = rotated(first[index], second[index], angle);
                    }
                }
            }
        });
    }
}

/// The pair `(a, b)` turned by the angle of this cosine and sine.
fn rotated(a: f32, b: f32, (cosine, sine): (f32, f32)) -> (f32, f32) {
    (a * cosine - b * sine, b * cosine + a * sine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, on_threads, random};

    const TOLERANCE: f64 = 1e-6;

    fn frequencies(half: usize) -> Vec<f32> {
        (0..half)
            .map(|i| 10_000f32.powf(-(i as f32) / half as f32))
            .collect()
    }

    /// Hugging Face's formula, `x·cos + rotate_half(x)·sin`, written out in f64.
    fn naive(x: &[f32], heads: usize, table: (&[f32], &[usize], f32)) -> Vec<f64> {
        let (frequencies, positions, scale) = table;
        let (half, dim) = (frequencies.len(), 2 * frequencies.len());
        (0..x.len())
            .map(|at| {
                let (token, index) = (at / (heads * dim), at % dim);
                let angle = f64::from(frequencies[index % half] * positions[token] as f32);
                let turned = if index < half {
                    -f64::from(x[at + half])
                } else {
                    f64::from(x[at - half])
                };
                f64::from(scale) * (f64::from(x[at]) * angle.cos() + turned * angle.sin())
            })
            .collect()
    }

    #[test]
    fn agrees_with_the_rotate_half_formula() {
        for (tokens, heads, half) in [
            (0, 1, 4),
            (1, 1, 1),
            (63, 8, 2),
            (64, 1, 4),
            (65, 3, 4),
            (7, 2, 32),
        ] {
            let frequencies = frequencies(half);
            let positions: Vec<usize> = (0..tokens).map(|t| t * 37 % 101).collect();
            for scale in [1.0, 1.25] {
                let table = RopeTable::new(&frequencies, &positions, scale);
                let x = random(tokens * heads * 2 * half, 1);
                let mut out = x.clone();
                table.apply(&mut out, heads);
                let expected = naive(&x, heads, (&frequencies, &positions, scale));
                assert_close("rope", &out, &expected, TOLERANCE);
            }
        }
    }

    #[test]
    fn the_transpose_is_the_adjoint() {
        let table = RopeTable::new(&frequencies(8), &[0, 5, 900], 1.5);
        let (x, y) = (random(3 * 32, 1), random(3 * 32, 2));
        let (mut forward, mut backward) = (x.clone(), y.clone());
        table.apply(&mut forward, 2);
        table.apply_transpose(&mut backward, 2);
        let inner = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        };
        assert!((inner(&forward, &y) - inner(&x, &backward)).abs() < 1e-5);
    }

    #[test]
    fn threads_change_no_bit_and_the_inverse_undoes() {
        let positions: Vec<usize> = (0..500).collect();
        let table = RopeTable::new(&frequencies(16), &positions, 1.0);
        let x = random(500 * 4 * 32, 1);
        let run = || {
            let mut out = x.clone();
            table.apply(&mut out, 4);
            out
        };
        let mut out = on_threads(1, run);
        assert_eq!(out, on_threads(2, run));
        table.apply_transpose(&mut out, 4);
        assert_close("undone", &out, &crate::testing::widen(&x), TOLERANCE);
    }

    #[test]
    fn split_and_join_are_the_steps_one_by_one() {
        let frequencies = [1.0, 0.1, 0.01];
        for (heads, kv_heads) in [(1, 1), (3, 3), (3, 1), (8, 1)] {
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim: 6,
            };
            for tokens in [0, 1, 4, 63, 64, 65, 500] {
                let positions: Vec<usize> = (0..tokens).map(|t| t * 37 % 101).collect();
                let table = RopeTable::new(&frequencies, &positions, 1.0);
                for threads in [1, 2] {
                    on_threads(threads, || splits_and_joins(&table, tokens, shape));
                }
            }
        }
    }

    fn splits_and_joins(table: &RopeTable, tokens: usize, shape: AttentionShape) {
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let joined = random(tokens * shape.joined_width(), 3);
        let [mut q, mut k, mut v] = [queries, keys, keys].map(|width| vec![0.0; tokens * width]);
        crate::testing::split_columns(&joined, tokens, &mut [&mut q, &mut k, &mut v]);
        table.apply(&mut q, shape.heads);
        table.apply(&mut k, shape.kv_heads);
        let steps = [q, k, v];
        assert!(table.split(&joined, shape) == steps);
        let mut parts = steps.clone().map(|part| vec![7.0; part.len()]);
        let [a, b, c] = &mut parts;
        table.split_into(&joined, shape, [a, b, c]);
        assert!(parts == steps);
        let [mut q, mut k, v] = steps;
        let gradient = table.join([&q, &k, &v], shape);
        table.apply_transpose(&mut q, shape.heads);
        table.apply_transpose(&mut k, shape.kv_heads);
        for (row, gradient) in gradient.chunks_exact(shape.joined_width()).enumerate() {
            let key = row * keys..(row + 1) * keys;
            let parts = [&q[row * queries..][..queries], &k[key.clone()], &v[key]];
            assert_eq!(gradient, parts.concat());
        }
    }
}
