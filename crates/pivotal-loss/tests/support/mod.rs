//! Tensors in f64, and how close to them a number must be.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// The fixtures carry 15 digits, and a loss is some ten operations in f64.
pub(crate) const TOLERANCE: f64 = 1e-12;

pub(crate) fn leaf(values: &[f64]) -> Tensor<1> {
    constant(values).require_grad()
}

pub(crate) fn constant(values: &[f64]) -> Tensor<1> {
    let device = Device::flex().autodiff();
    let data = TensorData::new(values.to_vec(), [values.len()]);
    Tensor::from_data(data, (&device, DType::F64))
}

pub(crate) fn numbers(tensor: Tensor<1>) -> Vec<f64> {
    tensor.try_into_vec_as().unwrap()
}

pub(crate) fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let error = (found - expected).abs();
        assert!(
            error <= TOLERANCE * expected.abs().max(1.0),
            "{what}: {found} is not {expected}"
        );
    }
}
