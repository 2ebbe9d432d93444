//! Matrix products in the three forms a linear layer needs: forward (`nt`), input gradient (`nn`), weight gradient (`tn`).

use gemm::Parallelism;

use crate::parallel::{check_matrix, reaches};
use crate::small;

/// What the operands of a product are rounded to. Sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// f32 operands.
    #[default]
    F32,
    /// Operands rounded to bf16 (to nearest, ties to even) where [`bf16_available`]; f32 operands elsewhere.
    Bf16,
}

/// Whether this processor multiplies bf16 pairs itself (AVX-512 BF16, or AMX), so that [`Precision::Bf16`] has an effect.
#[must_use]
pub fn bf16_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        crate::bf16::available()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// What a product does with what its output held before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Overwrites it (β = 0).
    Replace,
    /// Adds to it (β = 1).
    Add,
}

/// The sizes of a product: `[m, k]` times `[k, n]` gives `[m, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductShape {
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// Below this many rows `a · bᵀ` costs the `gemm` crate more for repacking `b` than for multiplying.
pub(crate) const FEW_ROWS: usize = 64;
/// For `a · b` it repacks cheaply, so only few rows against a weight larger than the caches are better off without.
const FEW_ROWS_NN: usize = 32;
const LARGE_WEIGHT: usize = 1 << 22;
/// Multiply-adds below which a second thread does not pay for its start.
const PARALLEL_WORK: usize = 1 << 18;

/// `out (+)= a · bᵀ`: a linear layer's forward pass `y = x Wᵀ`.
///
/// # Shapes
/// `a` is `[m, k]`, `b` is `[n, k]`, `out` is `[m, n]`.
///
/// # Panics
/// If a slice's length is not what `shape` says.
///
/// # Examples
/// ```
/// use pivotal_kernels::{Precision, ProductShape, Store, matmul_nt};
/// let (x, weight) = ([1.0, 2.0], [3.0, 4.0, 5.0, 6.0]);
/// let mut y = [0.0; 2];
/// matmul_nt(&x, &weight, &mut y, ProductShape { m: 1, n: 2, k: 2 }, Store::Replace, Precision::F32);
/// assert_eq!(y, [11.0, 17.0]);
/// ```
pub fn matmul_nt(
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
    precision: Precision,
) {
    let ProductShape { m, n, k } = shape;
    check(a, b, out, shape);
    if precision == Precision::Bf16 && bf16_product(a, (k, 1), b, (1, k), out, shape, store) {
        return;
    }
    if m < FEW_ROWS {
        return small::few_rows_nt(a, b, out, shape, store);
    }
    f32_product(
        a,
        (k, 1),
        b,
        (1, k),
        out,
        n,
        shape,
        store,
        parallelism(shape),
    );
}

/// `out (+)= a · b`: a linear layer's input gradient `dx = dy W`.
///
/// # Shapes
/// `a` is `[m, k]`, `b` is `[k, n]`, `out` is `[m, n]`.
///
/// # Panics
/// If a slice's length is not what `shape` says.
pub fn matmul_nn(
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
    precision: Precision,
) {
    let ProductShape { m, n, k } = shape;
    check(a, b, out, shape);
    if precision == Precision::Bf16 && bf16_product(a, (k, 1), b, (n, 1), out, shape, store) {
        return;
    }
    if m < FEW_ROWS_NN && n * k >= LARGE_WEIGHT {
        return small::few_rows_nn(a, b, out, shape, store);
    }
    f32_product(
        a,
        (k, 1),
        b,
        (n, 1),
        out,
        n,
        shape,
        store,
        parallelism(shape),
    );
}

/// `out (+)= aᵀ · b`: a linear layer's weight gradient `dW = dyᵀ x`.
///
/// # Shapes
/// `a` is `[k, m]`, `b` is `[k, n]`, `out` is `[m, n]`.
///
/// # Panics
/// If a slice's length is not what `shape` says.
pub fn matmul_tn(
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
    precision: Precision,
) {
    let ProductShape { m, n, .. } = shape;
    check(a, b, out, shape);
    if precision == Precision::Bf16 && bf16_product(a, (1, m), b, (n, 1), out, shape, store) {
        return;
    }
    f32_product(
        a,
        (1, m),
        b,
        (n, 1),
        out,
        n,
        shape,
        store,
        parallelism(shape),
    );
}

#[track_caller]
fn check(a: &[f32], b: &[f32], out: &[f32], shape: ProductShape) {
    check_matrix("a", a, shape.m, shape.k);
    check_matrix("b", b, shape.n, shape.k);
    check_matrix("out", out, shape.m, shape.n);
}

pub(crate) fn parallelism(ProductShape { m, n, k }: ProductShape) -> Parallelism {
    if m.saturating_mul(n).saturating_mul(k) < PARALLEL_WORK {
        Parallelism::None
    } else {
        Parallelism::Rayon(0)
    }
}

/// Computes the product in bf16 and says so, or says that this processor cannot.
fn bf16_product(
    a: &[f32],
    a_strides: (usize, usize),
    b: &[f32],
    b_strides: (usize, usize),
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if crate::bf16::available() {
        crate::bf16::product(a, a_strides, b, b_strides, out, shape, store);
        return true;
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (a, a_strides, b, b_strides, out, shape, store);
    false
}

/// `out (+)= a · b` with any strides, (row, column) of the logical `[m, k]` and `[k, n]` operands; rows of `out` are
/// `out_stride` apart. Slices may be longer than the matrices.
///
/// The `gemm` crate cuts `m` and `n` between threads, never `k`, so the sums do not depend on their number.
#[expect(
    clippy::too_many_arguments,
    reason = "the one strided entry to the gemm crate"
)]
pub(crate) fn f32_product(
    a: &[f32],
    a_strides: (usize, usize),
    b: &[f32],
    b_strides: (usize, usize),
    out: &mut [f32],
    out_stride: usize,
    shape: ProductShape,
    store: Store,
    parallelism: Parallelism,
) {
    let ProductShape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        reaches(a.len(), (m, k), a_strides),
        "`a` is shorter than its strides reach"
    );
    assert!(
        reaches(b.len(), (k, n), b_strides),
        "`b` is shorter than its strides reach"
    );
    assert!(out_stride >= n, "rows of `out` overlap");
    assert!(
        reaches(out.len(), (m, n), (out_stride, 1)),
        "`out` is shorter than its strides reach"
    );
    let stride =
        |stride: usize| isize::try_from(stride).expect("a slice is at most isize::MAX long");
    // SAFETY: the three assertions above keep every address inside its slice; `out` is borrowed mutably, so it overlaps
    // neither operand; its rows do not overlap.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride(out_stride),
            store == Store::Add,
            a.as_ptr(),
            stride(a_strides.1),
            stride(a_strides.0),
            b.as_ptr(),
            stride(b_strides.1),
            stride(b_strides.0),
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, naive_product, on_each, on_threads, random};
    use proptest::prelude::*;

    // f32 sums of up to 2100 terms of size about 1.
    const F32_TOLERANCE: f64 = 5e-5;
    // Each operand is off by at most 2^-9 of itself (8 bits of mantissa, to nearest), so a term by 2^-8 and a sum of random
    // signs by much less; tiny sums see the whole of it.
    const BF16_TOLERANCE: f64 = 1.0 / 128.0;

    type Product = fn(&[f32], &[f32], &mut [f32], ProductShape, Store, Precision);

    /// A form's name, the function, and the (row, column) strides of its two logical operands.
    type Form = (&'static str, Product, (usize, usize), (usize, usize));

    fn forms(shape: ProductShape) -> [Form; 3] {
        let ProductShape { m, n, k } = shape;
        [
            ("nt", matmul_nt, (k, 1), (1, k)),
            ("nn", matmul_nn, (k, 1), (n, 1)),
            ("tn", matmul_tn, (1, m), (n, 1)),
        ]
    }

    fn compare(shape: ProductShape, store: Store) {
        let ProductShape { m, n, k } = shape;
        let (a, b, start) = (random(m * k, 1), random(n * k, 2), random(m * n, 3));
        for (name, product, a_strides, b_strides) in forms(shape) {
            let expected = naive_product(&a, a_strides, &b, b_strides, &start, shape, store);
            for (precision, tolerance) in [
                (Precision::F32, F32_TOLERANCE),
                (Precision::Bf16, BF16_TOLERANCE),
            ] {
                let mut out = start.clone();
                product(&a, &b, &mut out, shape, store, precision);
                assert_close(
                    &format!("{name} {precision:?} {shape:?}"),
                    &out,
                    &expected,
                    tolerance,
                );
            }
        }
    }

    #[test]
    fn all_forms_agree_with_f64_over_odd_shapes() {
        on_each(|| {
            for m in [0, 1, 7, 63, 64, 65, 130] {
                for n in [0, 1, 16, 47, 49, 100] {
                    for k in [0, 1, 2, 31, 33, 65] {
                        for store in [Store::Replace, Store::Add] {
                            compare(ProductShape { m, n, k }, store);
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn small_whole_numbers_are_exact_on_every_path() {
        let whole = |len, seed| -> Vec<f32> {
            random(len, seed)
                .iter()
                .map(|x| (4.0 * x).round())
                .collect()
        };
        on_each(|| {
            for m in [1, 15, 16, 17, 31, 33, 63, 64, 65] {
                for (n, k) in [(1, 1), (47, 31), (48, 33), (49, 576), (16, 33), (32, 64)] {
                    let shape = ProductShape { m, n, k };
                    let (a, b, start) = (whole(m * k, 1), whole(n * k, 2), whole(m * n, 3));
                    for (name, product, a_strides, b_strides) in forms(shape) {
                        for store in [Store::Replace, Store::Add] {
                            let expected =
                                naive_product(&a, a_strides, &b, b_strides, &start, shape, store);
                            let mut out = start.clone();
                            product(&a, &b, &mut out, shape, store, Precision::Bf16);
                            assert_close(&format!("{name} {shape:?}"), &out, &expected, 0.0);
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn sums_over_several_blocks_agree_with_f64() {
        on_each(|| {
            compare(
                ProductShape {
                    m: 70,
                    n: 50,
                    k: 1100,
                },
                Store::Add,
            );
            compare(
                ProductShape {
                    m: 9,
                    n: 50,
                    k: 2100,
                },
                Store::Replace,
            );
            compare(
                ProductShape {
                    m: 3,
                    n: 1300,
                    k: 40,
                },
                Store::Replace,
            );
        });
    }

    #[test]
    fn few_rows_against_a_large_weight_agree_with_f64() {
        let (n, k) = (64, LARGE_WEIGHT / 64);
        let shape = ProductShape { m: 2, n, k };
        let (a, b) = (random(2 * k, 1), random(n * k, 2));
        let expected = naive_product(&a, (k, 1), &b, (n, 1), &[], shape, Store::Replace);
        let mut out = vec![f32::NAN; 2 * n];
        matmul_nn(&a, &b, &mut out, shape, Store::Replace, Precision::F32);
        // Sums of 65536 terms of random sign, about 100 in size.
        assert_close("nn", &out, &expected, 1e-4);
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        if !bf16_available() {
            return;
        }
        // bf16 has 7 stored mantissa bits: 1 + 2^-8 is a tie between 1 (even) and 1 + 2^-7; 1 + 3·2^-8 one between
        // 1 + 2^-7 and 1 + 2^-6 (even).
        let a = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 5.0 / 1024.0];
        let expected = [1.0, 1.0 + 1.0 / 64.0, 1.0 + 1.0 / 128.0];
        let mut out = [0.0; 3];
        let shape = ProductShape { m: 3, n: 1, k: 1 };
        matmul_nt(&a, &[1.0], &mut out, shape, Store::Replace, Precision::Bf16);
        assert_eq!(out, expected);
    }

    #[test]
    fn threads_change_no_bit() {
        on_each(|| {
            for shape in [
                ProductShape {
                    m: 150,
                    n: 333,
                    k: 700,
                },
                ProductShape {
                    m: 9,
                    n: 2000,
                    k: 129,
                },
                ProductShape {
                    m: 64,
                    n: 64,
                    k: 64,
                },
            ] {
                let (a, b) = (random(shape.m * shape.k, 1), random(shape.n * shape.k, 2));
                for (name, product, _, _) in forms(shape) {
                    for precision in [Precision::F32, Precision::Bf16] {
                        let run = || {
                            let mut out = vec![0.0; shape.m * shape.n];
                            product(&a, &b, &mut out, shape, Store::Replace, precision);
                            out
                        };
                        let one = on_threads(1, run);
                        for threads in [2, 3] {
                            assert_eq!(
                                one,
                                on_threads(threads, run),
                                "{name} {precision:?} {shape:?}"
                            );
                        }
                    }
                }
            }
        });
    }

    #[test]
    #[should_panic(expected = "`b` has 5 elements, expected 2 x 3")]
    fn a_wrong_length_panics() {
        let shape = ProductShape { m: 1, n: 2, k: 3 };
        matmul_nt(
            &[0.0; 3],
            &[0.0; 5],
            &mut [0.0; 2],
            shape,
            Store::Replace,
            Precision::F32,
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn adding_is_replacing_plus_what_was_there(m in 1usize..70, n in 1usize..70, k in 1usize..70) {
            let shape = ProductShape { m, n, k };
            let (a, b) = (random(m * k, 5), random(n * k, 6));
            for precision in [Precision::F32, Precision::Bf16] {
                let mut once = vec![0.0; m * n];
                matmul_nt(&a, &b, &mut once, shape, Store::Replace, precision);
                let mut twice = once.clone();
                matmul_nt(&a, &b, &mut twice, shape, Store::Add, precision);
                let doubled: Vec<f64> = once.iter().map(|&x| 2.0 * f64::from(x)).collect();
                assert_close("twice", &twice, &doubled, 1e-6);
            }
        }
    }
}
