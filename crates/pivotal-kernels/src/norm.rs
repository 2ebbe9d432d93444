//! Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467) and its gradient.
//!
//! ```text
//! y = w · x · r,  r = 1/√(mean(x²) + eps)
//! dx = r·(w·dy) - x · r³/h · Σ(w·dy·x),  dw = Σ_rows dy·x·r
//! ```

use rayon::prelude::*;

use crate::lanes::dot;
use crate::parallel::{
    SERIAL_WORK, SharedOut, check_len, check_matrix, for_each_block, rows_per_block,
};

/// Rows whose part of the weight gradient is summed before the parts are: fixed, so that threads change no bit.
const GRADIENT_ROWS: usize = 64;

/// Normalises each row of `x` and multiplies it by `weight`; `rstd` gets each row's `1/√(mean(x²) + eps)`.
///
/// # Shapes
/// `x` and `out` are `[rows, hidden]`, `weight` is `[hidden]`, `rstd` is `[rows]`.
///
/// # Panics
/// If the lengths do not fit.
pub fn rms_norm_forward(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32], rstd: &mut [f32]) {
    let hidden = weight.len();
    let rows = rstd.len();
    check_matrix("x", x, rows, hidden);
    check_matrix("out", out, rows, hidden);
    let (out, rstd) = (SharedOut::new(out), SharedOut::new(rstd));
    for_each_block(rows, rows_per_block(hidden), 4 * x.len(), |block| {
        for row in block {
            let x = &x[row * hidden..][..hidden];
            let scale = row_rstd(x, eps);
            // SAFETY: row `row` of `out` and element `row` of `rstd` are this block's own.
            let out = unsafe {
                *rstd.at(row) = scale;
                out.slice(row * hidden, hidden)
            };
            scale_row(x, weight, scale, out);
        }
    });
}

/// `1/√(mean(x²) + eps)` of one row.
pub(crate) fn row_rstd(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// One row of the output.
pub(crate) fn scale_row(x: &[f32], weight: &[f32], rstd: f32, out: &mut [f32]) {
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * rstd * weight;
    }
}

/// Where [`rms_norm_backward`] puts its gradients.
#[derive(Debug)]
pub struct RmsNormGradients<'a> {
    /// `[rows, hidden]`, overwritten.
    pub x: &'a mut [f32],
    /// `[hidden]`, added to; `None` for a frozen weight, which then costs nothing.
    pub weight: Option<&'a mut [f32]>,
}

/// The gradient of [`rms_norm_forward`]; `rstd` is what that returned.
///
/// # Shapes
/// `x` and `dout` are `[rows, hidden]`, `weight` is `[hidden]`, `rstd` is `[rows]`.
///
/// # Panics
/// If the lengths do not fit.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    dout: &[f32],
    gradients: RmsNormGradients<'_>,
) {
    let hidden = weight.len();
    let rows = rstd.len();
    check_matrix("x", x, rows, hidden);
    check_matrix("dout", dout, rows, hidden);
    check_matrix("gradients.x", gradients.x, rows, hidden);
    // SAFETY: the gradient has as many elements as `x`, by the check above.
    unsafe { input_gradient(x, weight, rstd, dout, SharedOut::new(gradients.x)) };
    if let Some(dweight) = gradients.weight {
        check_len("gradients.weight", dweight, hidden);
        weight_gradient(x, rstd, dout, dweight);
    }
}

/// The gradient of `x`, every element of it, into memory that need not be initialised.
///
/// # Safety
/// `x` and `dout` have a row for each of `rstd`; `dx` has as many floats, which nobody else touches meanwhile.
pub(crate) unsafe fn input_gradient(
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    dout: &[f32],
    dx: SharedOut,
) {
    let (rows, hidden) = (rstd.len(), weight.len());
    for_each_block(rows, rows_per_block(hidden), 6 * x.len(), |block| {
        for row in block {
            let (x, dout) = (
                &x[row * hidden..][..hidden],
                &dout[row * hidden..][..hidden],
            );
            // SAFETY: row `row` of the gradient is this block's own.
            let dx = unsafe { dx.slice(row * hidden, hidden) };
            row_input_gradient(x, weight, rstd[row], dout, dx);
        }
    });
}

/// One row of the gradient of `x`.
pub(crate) fn row_input_gradient(
    x: &[f32],
    weight: &[f32],
    rstd: f32,
    dout: &[f32],
    dx: &mut [f32],
) {
    for ((dx, &dout), &weight) in dx.iter_mut().zip(dout).zip(weight) {
        *dx = dout * weight;
    }
    let slope = dot(dx, x) * rstd * rstd * rstd / x.len() as f32;
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = *dx * rstd - x * slope;
    }
}

fn weight_gradient(x: &[f32], rstd: &[f32], dout: &[f32], dweight: &mut [f32]) {
    let hidden = dweight.len();
    if hidden == 0 || rstd.is_empty() {
        return;
    }
    let part = |block: usize| {
        let mut sums = vec![0.0; hidden];
        let first = block * GRADIENT_ROWS;
        for row in first..(first + GRADIENT_ROWS).min(rstd.len()) {
            let (x, dout) = (
                &x[row * hidden..][..hidden],
                &dout[row * hidden..][..hidden],
            );
            for ((sum, &x), &dout) in sums.iter_mut().zip(x).zip(dout) {
                *sum += dout * (x * rstd[row]);
            }
        }
        sums
    };
    let blocks = rstd.len().div_ceil(GRADIENT_ROWS);
    let parts: Vec<Vec<f32>> = if x.len() < SERIAL_WORK {
        (0..blocks).map(part).collect()
    } else {
        (0..blocks).into_par_iter().map(part).collect()
    };
    for part in parts {
        for (sum, part) in dweight.iter_mut().zip(part) {
            *sum += part;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, on_threads, random, widen};

    const EPS: f32 = 1e-5;
    // f32 sums of up to 700 terms of size about 1.
    const TOLERANCE: f64 = 1e-5;

    fn naive(x: &[f64], weight: &[f64]) -> Vec<f64> {
        x.chunks(weight.len())
            .flat_map(|x| {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
                let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
                x.iter()
                    .zip(weight)
                    .map(|(x, w)| x * scale * w)
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// The derivative of `Σ dout·y` by central differences in f64.
    fn differences(at: &[f64], value: impl Fn(&[f64]) -> Vec<f64>, dout: &[f64]) -> Vec<f64> {
        let step = 1e-5;
        (0..at.len())
            .map(|index| {
                let shifted = |by: f64| {
                    let mut at = at.to_vec();
                    at[index] += by;
                    value(&at).iter().zip(dout).map(|(y, d)| y * d).sum::<f64>()
                };
                (shifted(step) - shifted(-step)) / (2.0 * step)
            })
            .collect()
    }

    #[test]
    fn value_and_gradients_agree_with_f64() {
        for (rows, hidden) in [
            (0, 8),
            (1, 1),
            (3, 7),
            (2, 63),
            (2, 64),
            (63, 4),
            (64, 3),
            (65, 5),
            (1, 65),
            (130, 3),
        ] {
            let (x, weight, dout) = (
                random(rows * hidden, 1),
                random(hidden, 2),
                random(rows * hidden, 3),
            );
            let (mut out, mut rstd) = (vec![0.0; rows * hidden], vec![0.0; rows]);
            rms_norm_forward(&x, &weight, EPS, &mut out, &mut rstd);
            let (wide_x, wide_weight, wide_dout) = (widen(&x), widen(&weight), widen(&dout));
            assert_close("y", &out, &naive(&wide_x, &wide_weight), TOLERANCE);

            let (mut dx, mut dweight) = (vec![f32::NAN; rows * hidden], vec![1.0; hidden]);
            let gradients = RmsNormGradients {
                x: &mut dx,
                weight: Some(&mut dweight),
            };
            rms_norm_backward(&x, &weight, &rstd, &dout, gradients);
            let expected = differences(&wide_x, |x| naive(x, &wide_weight), &wide_dout);
            assert_close("dx", &dx, &expected, TOLERANCE);
            let expected = differences(&wide_weight, |w| naive(&wide_x, w), &wide_dout);
            let expected: Vec<f64> = expected.iter().map(|d| d + 1.0).collect();
            assert_close("dweight", &dweight, &expected, TOLERANCE);
        }
    }

    #[test]
    fn a_frozen_weight_and_threads_change_no_bit() {
        let (rows, hidden) = (300, 700);
        let (x, weight, dout) = (
            random(rows * hidden, 1),
            random(hidden, 2),
            random(rows * hidden, 3),
        );
        let run = |frozen: bool| {
            let (mut out, mut rstd) = (vec![0.0; rows * hidden], vec![0.0; rows]);
            rms_norm_forward(&x, &weight, EPS, &mut out, &mut rstd);
            let (mut dx, mut dweight) = (vec![0.0; rows * hidden], vec![0.0; hidden]);
            let weight_gradient = if frozen { None } else { Some(&mut dweight[..]) };
            let gradients = RmsNormGradients {
                x: &mut dx,
                weight: weight_gradient,
            };
            rms_norm_backward(&x, &weight, &rstd, &dout, gradients);
            (out, dx, dweight)
        };
        let one = on_threads(1, || run(false));
        assert_eq!(one, on_threads(2, || run(false)));
        assert_eq!(one.1, run(true).1);
    }
}
