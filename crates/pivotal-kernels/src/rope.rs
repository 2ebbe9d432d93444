//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the rotate-half convention of Hugging Face's Llama:
//! element `i` of a head is rotated with element `i + head_dim/2`.

use crate::parallel::{SharedOut, check_len, for_each_block, rows_per_block};

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

    fn rotate(&self, x: &mut [f32], heads: usize, direction: f32) {
        let (half, width) = (self.half, heads * self.head_dim());
        check_len("x", x, self.tokens * width);
        if width == 0 {
            return;
        }
        let len = x.len();
        let target = SharedOut::new(x);
        for_each_block(self.tokens, rows_per_block(width), 3 * len, |tokens| {
            for token in tokens {
                let (cosines, sines) = self.values[token * 2 * half..][..2 * half].split_at(half);
                // SAFETY: row `token` is this block's own.
                let row = unsafe { target.slice(token * width, width) };
                for head in row.chunks_exact_mut(2 * half) {
                    let (first, second) = head.split_at_mut(half);
                    for index in 0..half {
                        let (cosine, sine) = (cosines[index], sines[index] * direction);
                        let (a, b) = (first[index], second[index]);
                        first[index] = a * cosine - b * sine;
                        second[index] = b * cosine + a * sine;
                    }
                }
            }
        });
    }
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
        for (tokens, heads, half) in [(0, 1, 4), (1, 1, 1), (65, 3, 4), (7, 2, 32)] {
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
}
