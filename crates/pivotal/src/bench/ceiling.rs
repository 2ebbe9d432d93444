//! What this machine's matrix products reach at best: the yardstick of every share.

use std::time::Instant;

use pivotal_kernels::{Precision, ProductShape, Store, bf16_available, matmul_nt};
use serde::Serialize;

use crate::bench::outcome::median;

/// Large, square, and more than the caches hold.
const SHAPE: ProductShape = ProductShape {
    m: 2048,
    n: 2048,
    k: 2048,
};
const SAMPLES: usize = 5;

/// Billions of operations a second with all threads, medians.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Ceiling {
    /// Operands in bf16; absent where the processor cannot multiply them.
    pub(crate) bf16_gflops: Option<f64>,
    /// Operands in f32.
    pub(crate) f32_gflops: f64,
    /// The same, of the products before the measurement alone: how steady the machine was.
    before: [Option<f64>; 2],
    /// And of those after it.
    after: [Option<f64>; 2],
}

/// Products timed at one moment, bf16 then f32.
pub(crate) struct Samples([Vec<f64>; 2]);

/// Times the products now.
pub(crate) fn sample() -> Samples {
    let bf16 = match bf16_available() {
        true => products(Precision::Bf16),
        false => Vec::new(),
    };
    Samples([bf16, products(Precision::F32)])
}

impl Ceiling {
    /// The ceiling of a measurement from the products around it.
    pub(crate) fn of(before: &Samples, after: &Samples) -> Self {
        let both = |which: usize| {
            let all: Vec<f64> = [&before.0[which][..], &after.0[which]].concat();
            median(&all)
        };
        let each = |samples: &Samples| [median(&samples.0[0]), median(&samples.0[1])];
        Self {
            bf16_gflops: both(0),
            f32_gflops: both(1).unwrap_or_default(),
            before: each(before),
            after: each(after),
        }
    }

    /// The ceiling of products whose operands are rounded to `precision`.
    pub(crate) fn gflops(&self, precision: Precision) -> f64 {
        match (precision, self.bf16_gflops) {
            (Precision::Bf16, Some(gflops)) => gflops,
            _ => self.f32_gflops,
        }
    }
}

fn products(precision: Precision) -> Vec<f64> {
    let ProductShape { m, n, k } = SHAPE;
    // Small whole numbers: exact in either precision, and no denormal slows them.
    let operand = |count: usize| (0..count).map(|index| (index % 7) as f32 - 3.0).collect();
    let (a, b): (Vec<f32>, Vec<f32>) = (operand(m * k), operand(n * k));
    let mut out = vec![0.0; m * n];
    let mut seconds = || {
        let begin = Instant::now();
        matmul_nt(&a, &b, &mut out, SHAPE, Store::Replace, precision);
        begin.elapsed().as_secs_f64()
    };
    // The first touches the pages.
    seconds();
    let operations = 2.0 * (m * n * k) as f64;
    (0..SAMPLES).map(|_| operations / seconds() / 1e9).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_is_the_median_of_both_sides() {
        let before = Samples([vec![], vec![1.0, 2.0, 9.0]]);
        let after = Samples([vec![], vec![3.0, 4.0]]);
        let ceiling = Ceiling::of(&before, &after);
        assert_eq!((ceiling.bf16_gflops, ceiling.f32_gflops), (None, 3.0));
        assert_eq!(ceiling.before, [None, Some(2.0)]);
        assert_eq!(ceiling.gflops(Precision::Bf16), 3.0);
        let faster = Samples([vec![8.0], vec![4.0]]);
        assert_eq!(Ceiling::of(&faster, &faster).gflops(Precision::Bf16), 8.0);
    }
}
