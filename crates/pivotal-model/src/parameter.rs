//! Parameters by name: how they come out of a checkpoint, and how optimizers and writers reach them.

use burn::tensor::{Device, Tensor, TensorData};
use pivotal_core::ContentHasher;

use crate::checkpoint::{Checkpoint, HostTensor};
use crate::error::{Error, Result};
use crate::projection::{PackedWeight, Projection, Weight};

/// Values hashed at a time.
const HASHED_VALUES: usize = 1 << 14;

/// A parameter of a model, borrowed for reading or replacing.
#[derive(Debug)]
pub enum Parameter<'a> {
    /// A weight or a low-rank factor, `[out, in]`.
    Matrix(&'a mut Tensor<2>),
    /// A norm's gain or a bias, `[width]`.
    Vector(&'a mut Tensor<1>),
    /// A weight that is not trained and of which only bf16 panels are kept, `[out, in]`.
    Packed(&'a PackedWeight),
}

/// What [`Parameters::visit_parameters`] calls with each parameter's name and the parameter.
pub type Visitor<'v> = dyn FnMut(&str, Parameter<'_>) + 'v;

/// A model that shows its parameters by name: all that an optimizer or a checkpoint needs of it.
pub trait Parameters {
    /// Shows every parameter, in a fixed order, under its checkpoint's key; an adapter's factors as
    /// `<module>.lora_A.weight` and `<module>.lora_B.weight`.
    fn visit_parameters(&mut self, visit: &mut Visitor<'_>);
}

impl Parameter<'_> {
    /// Replaces the tensor by what one of the two functions makes of it; a packed weight stays.
    pub fn map(
        self,
        matrix: impl FnOnce(Tensor<2>) -> Tensor<2>,
        vector: impl FnOnce(Tensor<1>) -> Tensor<1>,
    ) {
        match self {
            Self::Matrix(tensor) => *tensor = matrix(tensor.clone()),
            Self::Vector(tensor) => *tensor = vector(tensor.clone()),
            Self::Packed(_) => {}
        }
    }

    /// Whether a gradient is computed for it.
    pub fn is_trainable(&self) -> bool {
        match self {
            Self::Matrix(tensor) => tensor.is_require_grad(),
            Self::Vector(tensor) => tensor.is_require_grad(),
            Self::Packed(_) => false,
        }
    }

    /// Its shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Matrix(tensor) => tensor.dims().to_vec(),
            Self::Vector(tensor) => tensor.dims().to_vec(),
            Self::Packed(packed) => packed.dims().to_vec(),
        }
    }

    /// A copy in host memory; of a packed weight, as it was rounded to bf16.
    ///
    /// # Panics
    /// If the device cannot be read back.
    pub fn to_host(&self) -> HostTensor {
        match self {
            Self::Matrix(tensor) => to_host((*tensor).clone()),
            Self::Vector(tensor) => to_host((*tensor).clone()),
            Self::Packed(packed) => to_host(packed.to_tensor()),
        }
    }

    /// BLAKE3 of the values, little-endian and row-major, in hexadecimal; of a packed weight that of what it was before.
    ///
    /// # Panics
    /// If the device cannot be read back.
    pub fn digest(&self) -> String {
        match self {
            Self::Packed(packed) => packed.digest().to_owned(),
            _ => digest(self.to_host().values()),
        }
    }

    /// Overwrites the values, keeping the device and whether it is trainable.
    ///
    /// # Errors
    /// [`Error::Shape`], naming the tensor, if `value` has another shape.
    ///
    /// # Panics
    /// If this is a packed weight: it is made of a tensor once.
    pub fn assign(self, name: &str, value: &HostTensor) -> Result<()> {
        let trainable = self.is_trainable();
        match self {
            Self::Matrix(tensor) => {
                check_shape(name, value, tensor.dims())?;
                *tensor = leaf(value, &tensor.device(), trainable);
            }
            Self::Vector(tensor) => {
                check_shape(name, value, tensor.dims())?;
                *tensor = leaf(value, &tensor.device(), trainable);
            }
            Self::Packed(_) => panic!("`{name}` is packed: it takes no other values"),
        }
        Ok(())
    }
}

/// As [`Parameter::digest`].
pub(crate) fn digest(values: &[f32]) -> String {
    let mut hasher = ContentHasher::default();
    let mut bytes = Vec::with_capacity(size_of::<f32>() * HASHED_VALUES);
    for values in values.chunks(HASHED_VALUES) {
        bytes.clear();
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        hasher.update(&bytes);
    }
    hasher.finish()
}

pub(crate) fn on_tape<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.autodiff().require_grad()
}

pub(crate) fn off_tape<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.without_autodiff()
}

fn leaf<const D: usize>(value: &HostTensor, device: &Device, trainable: bool) -> Tensor<D> {
    let tensor = to_device(value, &device.clone().without_autodiff());
    if trainable { on_tape(tensor) } else { tensor }
}

fn check_shape<const D: usize>(name: &str, value: &HostTensor, expected: [usize; D]) -> Result<()> {
    match value.shape() == expected {
        true => Ok(()),
        false => Err(Error::Shape {
            what: name.into(),
            expected: expected.into(),
            found: value.shape().into(),
        }),
    }
}

/// The values of a tensor, in host memory.
pub(crate) fn to_host<const D: usize>(tensor: Tensor<D>) -> HostTensor {
    let shape = tensor.dims().to_vec();
    let values = tensor
        .into_data()
        .try_to_vec::<f32>()
        .expect("parameters are f32");
    HostTensor::new(shape, values).expect("a tensor has as many values as its shape says")
}

/// A frozen tensor of a device, copied there.
pub(crate) fn to_device<const D: usize>(value: &HostTensor, device: &Device) -> Tensor<D> {
    move_to_device(value.clone(), device)
}

/// A frozen tensor of a device; on the processor it takes over the memory of `value`.
fn move_to_device<const D: usize>(value: HostTensor, device: &Device) -> Tensor<D> {
    let shape = value.shape().to_vec();
    Tensor::from_data(TensorData::new(value.into_values(), shape), device)
}

/// Tensors of a checkpoint, taken out one by one on their way to a device, each checked against the shape expected.
pub(crate) struct WeightSource<'a> {
    checkpoint: &'a mut Checkpoint,
    device: &'a Device,
}

impl<'a> WeightSource<'a> {
    pub(crate) fn new(checkpoint: &'a mut Checkpoint, device: &'a Device) -> Self {
        Self { checkpoint, device }
    }

    pub(crate) fn tensor<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>> {
        check_shape(name, self.checkpoint.tensor(name)?, shape)?;
        let value = self.checkpoint.take_tensor(name)?;
        Ok(move_to_device(value, self.device))
    }

    pub(crate) fn projection(
        &mut self,
        path: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Projection> {
        let weight = self.tensor(&format!("{path}.weight"), shape)?;
        let bias = bias
            .then(|| self.tensor(&format!("{path}.bias"), [shape[0]]))
            .transpose()?;
        Ok(Projection {
            weight: Weight::Tensor(weight),
            bias,
            adapter: None,
        })
    }
}
