//! Eight floats at a time, and an exponential the compiler can vectorise.

/// `a * b + c`, fused where the target has the instruction: elsewhere `f32::mul_add` is a library call, 20 times slower.
#[inline(always)]
pub(crate) fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// The number of floats in a [`Lanes`].
pub(crate) const LANES: usize = 8;

#[cfg(all(
    target_arch = "x86_64",
    target_feature = "avx2",
    target_feature = "fma"
))]
mod imp {
    use super::LANES;
    use core::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps,
    };

    /// Eight floats in one AVX register.
    #[derive(Clone, Copy)]
    pub(crate) struct Lanes(__m256);

    impl Lanes {
        #[inline(always)]
        pub(crate) fn splat(value: f32) -> Self {
            // SAFETY: this module exists only where AVX2 and FMA are enabled at compile time.
            Self(unsafe { _mm256_set1_ps(value) })
        }

        #[inline(always)]
        pub(crate) fn load(from: &[f32]) -> Self {
            assert!(from.len() >= LANES);
            // SAFETY: eight floats are readable; the load needs no alignment; AVX is enabled at compile time.
            Self(unsafe { _mm256_loadu_ps(from.as_ptr()) })
        }

        #[inline(always)]
        pub(crate) fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: FMA is enabled at compile time.
            Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
        }

        #[inline(always)]
        pub(crate) fn store(self, to: &mut [f32]) {
            assert!(to.len() >= LANES);
            // SAFETY: eight floats are writable; the store needs no alignment; AVX is enabled at compile time.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), self.0) }
        }
    }
}

#[cfg(not(all(
    target_arch = "x86_64",
    target_feature = "avx2",
    target_feature = "fma"
)))]
mod imp {
    use super::{LANES, fused};

    /// Eight floats; the compiler picks the registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Lanes([f32; LANES]);

    impl Lanes {
        #[inline(always)]
        pub(crate) fn splat(value: f32) -> Self {
            Self([value; LANES])
        }

        #[inline(always)]
        pub(crate) fn load(from: &[f32]) -> Self {
            Self(std::array::from_fn(|lane| from[..LANES][lane]))
        }

        #[inline(always)]
        pub(crate) fn mul_add(self, factor: Self, addend: Self) -> Self {
            Self(std::array::from_fn(|lane| {
                fused(self.0[lane], factor.0[lane], addend.0[lane])
            }))
        }

        #[inline(always)]
        pub(crate) fn store(self, to: &mut [f32]) {
            to[..LANES].copy_from_slice(&self.0);
        }
    }
}

pub(crate) use imp::Lanes;

impl Lanes {
    /// The sum of the lanes, always in the same order.
    #[inline(always)]
    pub(crate) fn sum(self) -> f32 {
        let mut lane = [0.0; LANES];
        self.store(&mut lane);
        ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]))
    }
}

/// `Σ a·b`, in an order fixed by the length alone.
#[inline]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [Lanes::splat(0.0); 2];
    let (a_blocks, a_rest) = a.as_chunks::<{ 2 * LANES }>();
    let (b_blocks, b_rest) = b.as_chunks::<{ 2 * LANES }>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        sums[0] = Lanes::load(a).mul_add(Lanes::load(b), sums[0]);
        sums[1] = Lanes::load(&a[LANES..]).mul_add(Lanes::load(&b[LANES..]), sums[1]);
    }
    let rest = a_rest
        .iter()
        .zip(b_rest)
        .fold(0.0, |sum, (&a, &b)| fused(a, b, sum));
    sums[0].sum() + sums[1].sum() + rest
}

/// `Σ x`, in an order fixed by the length alone.
#[inline]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (sum, &value) in sums.iter_mut().zip(block) {
            *sum += value;
        }
    }
    Lanes::load(&sums).sum() + rest.iter().sum::<f32>()
}

/// The largest element; negative infinity for an empty slice, NaN ignored.
#[inline]
pub(crate) fn maximum(x: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (best, &value) in best.iter_mut().zip(block) {
            *best = if value > *best { value } else { *best };
        }
    }
    best.iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |best, &value| best.max(value))
}

/// `to += factor · from`.
#[inline]
pub(crate) fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = fused(factor, from, *to);
    }
}

const SMALLEST_EXPONENT: f32 = -87.336_54;
const LARGEST_EXPONENT: f32 = 88.37;

/// `e^x` to about two units in the last place, without a branch, so that loops over it vectorise.
///
/// Below -87.3 it is exactly 0 (so that a masked -inf weighs nothing), above 88.37 it stays at e^88.37; NaN stays NaN.
#[inline(always)]
#[expect(
    clippy::excessive_precision,
    reason = "the published constants of Cephes' expf"
)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer and leaves that integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < SMALLEST_EXPONENT {
        SMALLEST_EXPONENT
    } else {
        x
    };
    let clamped = if clamped > LARGEST_EXPONENT {
        LARGEST_EXPONENT
    } else {
        clamped
    };
    let shifted = fused(clamped, std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let rest = fused(whole, -0.693_359_375, clamped);
    let rest = fused(whole, 2.121_944_40e-4, rest);
    let series = fused(1.987_569_15e-4, rest, 1.398_199_950_7e-3);
    let series = fused(series, rest, 8.333_451_907_3e-3);
    let series = fused(series, rest, 4.166_579_589_4e-2);
    let series = fused(series, rest, 1.666_666_545_9e-1);
    let series = fused(series, rest, 5.000_000_120_1e-1);
    let series = fused(series, rest * rest, rest) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < SMALLEST_EXPONENT {
        0.0
    } else {
        series * power
    }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Runs a loop over elements that do not depend on each other, compiled for the widest vectors that the processor has. No
/// bit depends on which: nothing is summed, and Rust fuses nothing by itself.
///
/// `body` must be an `#[inline(always)]` closure, or it stays as wide as the build asks for.
#[inline(always)]
pub(crate) fn widest(body: impl FnOnce()) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw")]
        fn with_avx512(body: impl FnOnce()) {
            body();
        }
        if crate::processor::processor() >= crate::processor::Processor::Avx512 {
            // SAFETY: the features are part of that path.
            return unsafe { with_avx512(body) };
        }
    }
    body();
}

/// Replaces each `x` by `e^(x - shift)`.
#[inline]
pub(crate) fn exp_shifted(x: &mut [f32], shift: f32) {
    for x in x {
        *x = exp(*x - shift);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // Two units in the last place and the rounding of the reference.
    const EXP_TOLERANCE: f64 = 3e-7;

    #[test]
    fn exp_agrees_with_the_library_over_its_domain() {
        for step in -8733..=8837 {
            let x = step as f32 / 100.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) / expected - 1.0).abs();
            assert!(error < EXP_TOLERANCE, "exp({x}) is off by {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(200.0).is_finite());
        assert_eq!(sigmoid(200.0), 1.0);
        assert!(sigmoid(-200.0) < 1e-37);
    }

    #[test]
    fn maximum_of_nothing_is_minus_infinity() {
        assert_eq!(maximum(&[]), f32::NEG_INFINITY);
        assert_eq!(maximum(&[-3.0]), -3.0);
    }

    proptest! {
        #[test]
        fn sums_agree_with_f64(x in prop::collection::vec(-2.0f32..2.0, 0..200)) {
            let wide: f64 = x.iter().map(|&x| f64::from(x)).sum();
            let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            prop_assert!((f64::from(sum(&x)) - wide).abs() < 1e-4);
            prop_assert!((f64::from(dot(&x, &x)) - squares).abs() < 1e-3);
            let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(maximum(&x), largest);
        }

        #[test]
        fn lanes_load_and_store(x in prop::array::uniform8(-9.0f32..9.0)) {
            let mut back = [0.0; LANES];
            Lanes::load(&x).mul_add(Lanes::splat(2.0), Lanes::splat(1.0)).store(&mut back);
            for (x, back) in x.iter().zip(back) {
                prop_assert_eq!(back, fused(*x, 2.0, 1.0));
            }
        }
    }
}
