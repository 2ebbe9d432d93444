//! What the tests of the decoder share: golden checkpoints and numbers, and how far apart two arrays are.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use pivotal_core::Pack;
use pivotal_model::{Decoder, load};
use pivotal_ops::Precision;
use serde_json::Value;

/// A file or directory of `tests/golden`.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// A checkpoint as a frozen decoder.
pub(crate) fn decoder(path: &Path, precision: Precision) -> Decoder {
    let checkpoint = load(path).unwrap();
    Decoder::from_checkpoint(&checkpoint, &Device::flex(), precision).unwrap()
}

/// A JSON file of `tests/golden`.
pub(crate) fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

/// The numbers of an array of any depth, in order.
pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    match value.as_array() {
        Some(items) => items.iter().flat_map(numbers).collect(),
        None => vec![value.as_f64().unwrap()],
    }
}

/// Token ids.
pub(crate) fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
        .collect()
}

/// One sequence as a prompt of its first token and a response of the rest, so that every token after the first is scored.
pub(crate) fn sequence(ids: &[u32]) -> Pack {
    let mut pack = Pack::default();
    pack.push(&ids[..1], &[&ids[1..]]).unwrap();
    pack
}

/// The values of a tensor.
pub(crate) fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap()
}

/// The log-probability of every token of every response in the pack.
pub(crate) fn logps(decoder: &Decoder, pack: &Pack) -> Vec<f32> {
    let hidden = decoder.hidden(pack).unwrap();
    floats(decoder.token_logps(&hidden, &pack.gather(|_, _| true)))
}

/// The largest difference of two arrays; infinite where one has a number and the other none.
pub(crate) fn difference(
    found: &[f32],
    expected: impl IntoIterator<Item = f64, IntoIter: ExactSizeIterator>,
) -> f64 {
    let expected = expected.into_iter();
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(&a, b)| {
        let difference = (f64::from(a) - b).abs();
        if difference.is_nan() {
            f64::INFINITY
        } else {
            difference
        }
    });
    differences.fold(0.0, f64::max)
}

/// The same numbers in `f64`.
pub(crate) fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}
