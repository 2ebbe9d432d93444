//! Logarithms and exponentials that neither overflow nor lose their gradient. Every loss takes them from here.

use burn::tensor::{Tensor, activation};

/// `log σ(x)`, element by element, in nats: finite, with the gradient `σ(-x)`, for every finite `x`.
///
/// The gradient is set by hand. The stable form `min(x, 0) - log(1 + exp(-|x|))` left to autodiff has the slope 1 or 0
/// at 0, whatever a backend takes for the slope of `min` and `|x|` there, in place of ½; and every margin of a first DPO
/// step is 0.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// let x = Tensor::<1>::from_floats([0.0, -200.0], &Device::flex());
/// let y = pivotal_loss::log_sigmoid(x).try_into_vec_as::<f32>().unwrap();
/// assert_eq!(y, [-(2f32.ln()), -200.0]);
/// ```
pub fn log_sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let at = x.clone().detach();
    let value = at.clone().clamp_max(0.0) - at.clone().abs().neg().exp().log1p();
    let slope = activation::sigmoid(at.clone().neg());
    // `x - at` is exactly 0, so the value is untouched.
    value + (x - at) * slope
}

/// `log Σ exp` of each row, in nats; its gradient is the row's softmax.
///
/// # Shapes
/// `x` `[rows, columns]`, at least one column, finite; returns `[rows]`.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// let x = Tensor::<2>::from_floats([[200.0, 200.0]], &Device::flex());
/// let y = pivotal_loss::log_sum_exp(x).into_scalar::<f32>();
/// assert!((y - (200.0 + 2f32.ln())).abs() < 2e-5);
/// ```
pub fn log_sum_exp(x: Tensor<2>) -> Tensor<1> {
    let largest = x.clone().detach().max_dim(1);
    let sum = (x - largest.clone()).exp().sum_dim(1);
    (sum.log() + largest).squeeze_dim(1)
}

/// `e^x - 1 - x`, element by element: at least 0, and right to the last digits also near 0, where the three terms cancel.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// let x = Tensor::<1>::from_floats([0.0, 1.0, 1e-4], &Device::flex());
/// let y = pivotal_loss::exp_remainder(x).try_into_vec_as::<f32>().unwrap();
/// assert_eq!(y[0], 0.0);
/// assert!((y[1] - (std::f32::consts::E - 2.0)).abs() < 1e-6);
/// assert!((y[2] / 0.5e-8 - 1.0).abs() < 1e-4);
/// ```
pub fn exp_remainder<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let small = x.clone().detach().abs().lower_elem(SERIES_BELOW);
    // Horner's form of x²/2·(1 + x/3·(1 + x/4·(…))), to x⁹.
    let mut series = x.ones_like();
    for order in (3..=9).rev() {
        series = (series * x.clone().mul_scalar(f64::from(order).recip())).add_scalar(1.0);
    }
    let series = series * x.clone().square().mul_scalar(0.5);
    let plain = x.clone().exp().sub_scalar(1.0) - x;
    plain.mask_where(small, series)
}

/// Below this the first term that [`exp_remainder`]'s series leaves out is under 1e-15 of its value.
const SERIES_BELOW: f64 = 0.0625;

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, TensorData};

    use super::*;

    fn value_and_gradient(points: &[f64], dtype: DType) -> (Vec<f64>, Vec<f64>) {
        let device = Device::flex().autodiff();
        let data = TensorData::new(points.to_vec(), [points.len()]);
        let x = Tensor::<1>::from_data(data, (&device, dtype)).require_grad();
        let y = log_sigmoid(x.clone());
        let grads = y.clone().sum().backward();
        let gradient = x.grad(&grads).unwrap();
        (
            y.try_into_vec_as().unwrap(),
            gradient.try_into_vec_as().unwrap(),
        )
    }

    #[test]
    fn log_sigmoid_has_slope_one_half_at_zero() {
        for dtype in [DType::F32, DType::F64] {
            let (value, gradient) = value_and_gradient(&[0.0, -0.0], dtype);
            assert_eq!(gradient, [0.5, 0.5]);
            assert!((value[0] + std::f64::consts::LN_2).abs() < 1e-7);
        }
    }

    #[test]
    fn log_sigmoid_is_its_argument_far_below_zero_and_zero_far_above() {
        let (value, gradient) = value_and_gradient(&[-200.0, 200.0, -1e4, 1e4], DType::F32);
        assert_eq!(value, [-200.0, 0.0, -1e4, 0.0]);
        assert_eq!(gradient, [1.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn log_sigmoid_agrees_with_its_definition_in_f64() {
        let points: Vec<f64> = (-60..=60).map(|i| f64::from(i) / 4.0).collect();
        let (value, gradient) = value_and_gradient(&points, DType::F64);
        for ((x, value), gradient) in points.iter().zip(value).zip(gradient) {
            assert!((value + (-x).exp().ln_1p()).abs() < 1e-14, "{x}");
            assert!((gradient - 1.0 / (1.0 + x.exp())).abs() < 1e-15, "{x}");
        }
    }

    #[test]
    fn exp_remainder_and_its_slope_hold_on_both_sides_of_the_series() {
        let device = Device::flex().autodiff();
        let points = [
            -20.0, -0.07, -0.06, -1e-5, 0.0, 1e-9, 1e-5, 0.06, 0.07, 3.0f64,
        ];
        for dtype in [DType::F32, DType::F64] {
            let relative = if dtype == DType::F32 { 2e-4 } else { 1e-12 };
            let data = TensorData::new(points.to_vec(), [points.len()]);
            let x = Tensor::<1>::from_data(data, (&device, dtype)).require_grad();
            let y = exp_remainder(x.clone());
            let grads = y.clone().sum().backward();
            let gradient: Vec<f64> = x.grad(&grads).unwrap().try_into_vec_as().unwrap();
            let y: Vec<f64> = y.try_into_vec_as().unwrap();
            for ((&x, y), gradient) in points.iter().zip(y).zip(gradient) {
                let expected = match x.abs() < 1e-4 {
                    true => x * x * (0.5 + x / 6.0 + x * x / 24.0),
                    false => x.exp_m1() - x,
                };
                assert!(y >= 0.0, "{dtype:?} {x}: {y}");
                assert!(
                    (y - expected).abs() <= relative * expected,
                    "{dtype:?} {x}: {y}"
                );
                let slope = x.exp_m1();
                assert!(
                    (gradient - slope).abs() <= relative * slope.abs(),
                    "{dtype:?} {x}: {gradient}"
                );
            }
        }
    }

    #[test]
    fn log_sum_exp_has_the_softmax_for_gradient_at_any_size() {
        let device = Device::flex().autodiff();
        let rows = [[0.0f32, 0.0], [200.0, -200.0], [-200.0, -200.0]];
        let x = Tensor::<2>::from_floats(rows, &device).require_grad();
        let y = log_sum_exp(x.clone());
        let grads = y.clone().sum().backward();
        let gradient: Vec<f32> = x.grad(&grads).unwrap().try_into_vec_as().unwrap();
        assert_eq!(gradient, [0.5, 0.5, 1.0, 0.0, 0.5, 0.5]);
        let y: Vec<f32> = y.try_into_vec_as().unwrap();
        assert_eq!(y[0], 2f32.ln());
        assert_eq!(y[1], 200.0);
        assert!((y[2] - (2f32.ln() - 200.0)).abs() < 2e-5);
    }
}
