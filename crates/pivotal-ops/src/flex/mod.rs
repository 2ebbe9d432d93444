//! The fused bodies on Flex: slices of its tensors handed to the kernels, and one backward step an operation.
//!
//! A backward step keeps only what a tracked parent will need, so a frozen parent costs neither time nor memory.

pub(crate) mod frozen_linears;
pub(crate) mod frozen_logps;
pub(crate) mod frozen_mlp;
pub(crate) mod linear;
pub(crate) mod lora_linear;
pub(crate) mod residual;
pub(crate) mod rms_norm;
pub(crate) mod rope_attention;
pub(crate) mod swiglu;
pub(crate) mod token_logps;
pub(crate) mod vocabulary_kl;

use std::sync::Arc;

use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::Ops;
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Flex, TensorMetadata};
use burn::tensor::{Bytes, DType, Shape};
use pivotal_kernels::{Precision, RoundedFloats};

/// A float tensor of Flex under autodiff, whatever the checkpointing strategy.
pub(crate) type TrackedTensor = FloatTensor<Autodiff<Flex>>;

/// The tensor itself, or a copy where its elements do not lie one after the other.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    match tensor.as_slice::<f32>() {
        Some(_) => tensor,
        None => tensor.to_contiguous(),
    }
}

/// The elements of a tensor that went through [`contiguous`].
pub(crate) fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor
        .as_slice()
        .expect("a contiguous tensor of f32: `fused` checks the type, `contiguous` the layout")
}

/// A new tensor over `values`.
pub(crate) fn from_values(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        DType::F32,
    )
}

/// A tensor that only the backward pass reads again: rounded to bf16, in half the room, where its products are in bf16.
#[derive(Clone, Debug)]
pub(crate) enum Kept {
    Whole(FlexTensor),
    Rounded(Arc<RoundedFloats>, Shape),
}

impl Kept {
    pub(crate) fn new(tensor: FlexTensor, precision: Precision) -> Self {
        let rounded = match precision {
            Precision::Bf16 => RoundedFloats::new(floats(&tensor)),
            Precision::F32 => None,
        };
        match rounded {
            Some(rounded) => Self::Rounded(Arc::new(rounded), tensor.shape()),
            None => Self::Whole(tensor),
        }
    }

    pub(crate) fn with<T>(&self, body: impl FnOnce(&[f32]) -> T) -> T {
        match self {
            Self::Whole(tensor) => body(floats(tensor)),
            Self::Rounded(rounded, _) => rounded.with(body),
        }
    }

    pub(crate) fn shape(&self) -> Shape {
        match self {
            Self::Whole(tensor) => tensor.shape(),
            Self::Rounded(_, shape) => shape.clone(),
        }
    }
}

/// Hands each parent of `ops` that is tracked its gradient.
pub(crate) fn register<S, const N: usize>(
    grads: &mut Gradients,
    ops: &Ops<S, N>,
    gradients: [Option<FlexTensor>; N],
) {
    for (node, gradient) in ops.parents.iter().zip(gradients) {
        if let (Some(node), Some(gradient)) = (node, gradient) {
            grads.register::<Flex>(node.id, gradient);
        }
    }
}

/// `values` in the shape of what they are the gradient of, where there are any.
pub(crate) fn shaped_as(values: Option<Vec<f32>>, like: Option<Shape>) -> Option<FlexTensor> {
    Some(from_values(values?, like?))
}

/// Rows and columns.
pub(crate) fn dims(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.shape();
    [shape[0], shape[1]]
}

/// Changes the elements, in place where nobody else holds the tensor.
pub(crate) fn map_in_place(tensor: FlexTensor, change: impl FnOnce(&mut [f32])) -> FlexTensor {
    let mut tensor = contiguous(tensor);
    let elements = tensor.shape().num_elements();
    if tensor.is_unique() && tensor.storage::<f32>().len() == elements {
        change(tensor.storage_mut());
        return tensor;
    }
    let mut values = floats(&tensor).to_vec();
    change(&mut values);
    from_values(values, tensor.shape())
}

/// Token ids of any integer type. One that is negative becomes too large for any vocabulary, which the kernel refuses.
pub(crate) fn token_ids(targets: &FlexTensor) -> Vec<u32> {
    let targets = targets.to_contiguous();
    let refused = |_| u32::MAX;
    match targets.dtype() {
        DType::I64 => ids(&targets, |id: i64| {
            u32::try_from(id).unwrap_or_else(refused)
        }),
        DType::I32 => ids(&targets, |id: i32| {
            u32::try_from(id).unwrap_or_else(refused)
        }),
        DType::U64 => ids(&targets, |id: u64| {
            u32::try_from(id).unwrap_or_else(refused)
        }),
        DType::U32 => ids(&targets, |id: u32| id),
        other => panic!("`targets` is {other:?}, expected a 32- or 64-bit integer"),
    }
}

fn ids<E: burn::tensor::Element + bytemuck::Pod>(
    targets: &FlexTensor,
    id: impl Fn(E) -> u32,
) -> Vec<u32> {
    let slice = targets.as_slice::<E>().expect("contiguous, of this type");
    slice.iter().map(|&target| id(target)).collect()
}
