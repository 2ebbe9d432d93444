//! A weight packed once for many products with few rows: decoding with a key-value cache.

use crate::lasting::LastingFloats;
use crate::matmul::{Precision, ProductShape, Store};
use crate::parallel::check_matrix;
use crate::small;

/// Rows that f32 products take together: more would not stay in the second-level cache.
const BLOCK_ROWS: usize = 64;

/// A linear layer's weight `[outputs, inputs]`, laid out for [`PackedWeight::forward`].
///
/// At one row a product reads the weight once and is bound by memory: bf16 halves the time.
///
/// # Examples
/// ```
/// use pivotal_kernels::{PackedWeight, Precision};
/// let weight = PackedWeight::new(&[3.0, 4.0, 5.0, 6.0], 2, 2, Precision::Bf16);
/// let mut y = [0.0; 2];
/// weight.forward(&[1.0, 2.0], 1, &mut y);
/// assert_eq!(y, [11.0, 17.0]);
/// ```
#[derive(Clone, Debug)]
pub struct PackedWeight {
    outputs: usize,
    inputs: usize,
    values: Values,
}

#[derive(Clone, Debug)]
enum Values {
    /// Row-major, as it came.
    F32(LastingFloats),
    /// Panels of 48 outputs; a word, carried as an f32, is a pair of bf16.
    #[cfg(target_arch = "x86_64")]
    Bf16(LastingFloats),
}

impl PackedWeight {
    /// Packs `weight`, `[outputs, inputs]`, to be there about as long as others: small ones share large blocks of memory, freed
    /// with the last of them.
    ///
    /// [`Precision::Bf16`] rounds it to bf16 where the processor can multiply that, and keeps f32 elsewhere.
    ///
    /// # Panics
    /// If `weight` does not have `outputs * inputs` elements.
    #[must_use]
    pub fn new(weight: &[f32], outputs: usize, inputs: usize, precision: Precision) -> Self {
        Self::within(LastingFloats::zeroed, weight, outputs, inputs, precision)
    }

    /// [`PackedWeight::new`] for what is replaced before others are: it has its memory to itself.
    ///
    /// # Panics
    /// If `weight` does not have `outputs * inputs` elements.
    #[must_use]
    pub fn replaceable(
        weight: &[f32],
        outputs: usize,
        inputs: usize,
        precision: Precision,
    ) -> Self {
        Self::within(LastingFloats::alone, weight, outputs, inputs, precision)
    }

    fn within(
        zeroed: fn(usize) -> LastingFloats,
        weight: &[f32],
        outputs: usize,
        inputs: usize,
        precision: Precision,
    ) -> Self {
        check_matrix("weight", weight, outputs, inputs);
        let values = match precision {
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16 if crate::bf16_available() => {
                use crate::panels::{COLUMNS, Source, pack, packed_words};
                let source = Source {
                    values: weight,
                    line_stride: inputs,
                    k_stride: 1,
                    lines: outputs,
                    k: inputs,
                };
                let mut words = zeroed(packed_words::<COLUMNS>(outputs, inputs));
                pack::<COLUMNS>(source, words.as_mut_slice());
                Values::Bf16(words)
            }
            _ => {
                let mut values = zeroed(weight.len());
                values.as_mut_slice().copy_from_slice(weight);
                Values::F32(values)
            }
        };
        Self {
            outputs,
            inputs,
            values,
        }
    }

    /// Length of an output row.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Length of an input row.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// What the weight was really rounded to: never `Bf16` where [`bf16_available`](crate::bf16_available) is false.
    #[must_use]
    pub fn precision(&self) -> Precision {
        match self.values {
            Values::F32(_) => Precision::F32,
            #[cfg(target_arch = "x86_64")]
            Values::Bf16(_) => Precision::Bf16,
        }
    }

    /// `out = x Wᵀ`. A row's result is the same bit for bit whatever the other rows and their number.
    ///
    /// # Shapes
    /// `x` is `[rows, inputs]`, `out` is `[rows, outputs]`. Fastest for 1 to 64 rows, right for any.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn forward(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        self.product(x, rows, out, Store::Replace, None);
    }

    /// [`PackedWeight::forward`] where `next` is the weight of the product after it: in a team ([`with_team`](crate::with_team)) its
    /// first panels are on their way from memory when that product begins.
    ///
    /// # Shapes
    /// `x` is `[rows, inputs]`, `out` is `[rows, outputs]`.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn forward_before(&self, next: &Self, x: &[f32], rows: usize, out: &mut [f32]) {
        self.product(x, rows, out, Store::Replace, Some(next));
    }

    /// `out += x Wᵀ`, otherwise as [`PackedWeight::forward`].
    ///
    /// # Shapes
    /// `x` is `[rows, inputs]`, `out` is `[rows, outputs]`.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn forward_add(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        self.product(x, rows, out, Store::Add, None);
    }

    fn product(
        &self,
        x: &[f32],
        rows: usize,
        out: &mut [f32],
        store: Store,
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] next: Option<&Self>,
    ) {
        check_matrix("x", x, rows, self.inputs);
        check_matrix("out", out, rows, self.outputs);
        let (n, k) = (self.outputs, self.inputs);
        match &self.values {
            Values::F32(weight) => {
                for first in (0..rows).step_by(BLOCK_ROWS) {
                    let m = BLOCK_ROWS.min(rows - first);
                    let (x, out) = (&x[first * k..][..m * k], &mut out[first * n..][..m * n]);
                    small::few_rows_nt(x, weight.as_slice(), out, ProductShape { m, n, k }, store);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Values::Bf16(words) => {
                use crate::bf16::multiply_packed;
                use crate::few_rows::{MOST_ROWS, Next, multiply_few};
                use crate::panels::{Source, left_words, pack_left};
                let shape = ProductShape { m: rows, n, k };
                let next = next.and_then(|next| match &next.values {
                    Values::F32(_) => None,
                    Values::Bf16(words) => Some(Next {
                        words: words.as_slice(),
                        columns: next.outputs,
                        k: next.inputs,
                    }),
                });
                let source = Source {
                    values: x,
                    line_stride: k,
                    k_stride: 1,
                    lines: rows,
                    k,
                };
                crate::parallel::with_scratch(left_words(rows, k), |left| {
                    pack_left(source, left);
                    let words = words.as_slice();
                    if rows <= MOST_ROWS {
                        multiply_few(left, words, out, shape, store, next);
                    } else {
                        multiply_packed(left, words, out, (n, 0), shape, store);
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::matmul_nt;
    use crate::team::with_team;
    use crate::testing::{
        assert_close, naive_product, on_each, on_each_vector, on_threads, random,
    };

    // f32 sums of up to 1500 terms; bf16 as in matmul's tests.
    const F32_TOLERANCE: f64 = 5e-5;
    const BF16_TOLERANCE: f64 = 1.0 / 128.0;

    #[test]
    fn agrees_with_f64_over_odd_shapes() {
        on_each(|| {
            for (outputs, inputs) in [(1, 1), (47, 33), (48, 64), (65, 1500), (200, 7), (3, 0)] {
                let weight = random(outputs * inputs, 1);
                for rows in [0, 1, 3, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65] {
                    let x = random(rows * inputs, 2);
                    let shape = ProductShape {
                        m: rows,
                        n: outputs,
                        k: inputs,
                    };
                    let expected = naive_product(
                        &x,
                        (inputs, 1),
                        &weight,
                        (1, inputs),
                        &[],
                        shape,
                        Store::Replace,
                    );
                    for (precision, tolerance) in [
                        (Precision::F32, F32_TOLERANCE),
                        (Precision::Bf16, BF16_TOLERANCE),
                    ] {
                        let packed = PackedWeight::new(&weight, outputs, inputs, precision);
                        let mut out = vec![f32::NAN; rows * outputs];
                        packed.forward(&x, rows, &mut out);
                        let what = format!("{precision:?} {shape:?}");
                        assert_close(&what, &out, &expected, tolerance);
                        packed.forward_add(&x, rows, &mut out);
                        let twice: Vec<f64> = expected.iter().map(|y| 2.0 * y).collect();
                        assert_close(&what, &out, &twice, tolerance);
                    }
                }
            }
        });
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours_or_the_threads() {
        on_each(|| {
            let (rows, outputs, inputs) = (70, 700, 1111);
            let (weight, x) = (random(outputs * inputs, 1), random(rows * inputs, 2));
            for precision in [Precision::F32, Precision::Bf16] {
                let packed = PackedWeight::new(&weight, outputs, inputs, precision);
                let run = |x: &[f32]| {
                    let mut out = vec![0.0; x.len() / inputs * outputs];
                    packed.forward(x, x.len() / inputs, &mut out);
                    out
                };
                let all = on_threads(1, || run(&x));
                assert_eq!(all, on_threads(2, || run(&x)));
                for (row, expected) in x.chunks(inputs).zip(all.chunks(outputs)) {
                    assert_eq!(run(row), expected);
                }
            }
        });
    }

    #[test]
    fn a_team_and_a_weight_that_follows_change_no_bit() {
        on_each(|| {
            // Each product is large enough to be shared.
            let (outputs, inputs) = (700, 640);
            let (weight, next) = (random(outputs * inputs, 1), random(inputs * outputs, 2));
            for precision in [Precision::F32, Precision::Bf16] {
                let first = PackedWeight::new(&weight, outputs, inputs, precision);
                let second = PackedWeight::replaceable(&next, inputs, outputs, precision);
                for rows in [1, 16, 63, 64, 65] {
                    let x = random(rows * inputs, 3);
                    let plain = || {
                        let (mut hidden, mut out) = (vec![f32::NAN; rows * outputs], x.clone());
                        first.forward(&x, rows, &mut hidden);
                        second.forward_add(&hidden, rows, &mut out);
                        out
                    };
                    let followed = || {
                        let (mut hidden, mut out) = (vec![f32::NAN; rows * outputs], x.clone());
                        first.forward_before(&second, &x, rows, &mut hidden);
                        second.forward_add(&hidden, rows, &mut out);
                        out
                    };
                    let alone = on_threads(1, plain);
                    for threads in [1, 2, 3] {
                        assert!(on_threads(threads, followed) == alone);
                        assert!(on_threads(threads, || with_team(followed)) == alone);
                    }
                }
            }
        });
    }

    #[test]
    fn bf16_is_the_unpacked_product_bit_for_bit() {
        on_each_vector(|| {
            for rows in [5, 16, 64, 65] {
                is_the_unpacked_product(rows);
            }
        });
    }

    fn is_the_unpacked_product(rows: usize) {
        let (outputs, inputs) = (90, 1300);
        let (weight, x) = (random(outputs * inputs, 1), random(rows * inputs, 2));
        let packed = PackedWeight::new(&weight, outputs, inputs, Precision::Bf16);
        let rounds = packed.precision() == Precision::Bf16;
        assert_eq!(rounds, crate::bf16_available());
        let (mut fast, mut plain) = (vec![0.0; rows * outputs], vec![0.0; rows * outputs]);
        packed.forward(&x, rows, &mut fast);
        let shape = ProductShape {
            m: rows,
            n: outputs,
            k: inputs,
        };
        matmul_nt(
            &x,
            &weight,
            &mut plain,
            shape,
            Store::Replace,
            Precision::Bf16,
        );
        assert_eq!(fast, plain);
    }
}
