//! A weight that is not trained, kept only as the products read it.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use pivotal_kernels::FrozenPanels;

use crate::flex::floats;
use crate::frozen::frozen;

/// A frozen weight `[out, in]` of which only bf16 panels are kept: two bytes a weight, and two more once a gradient went
/// through it. Cloning is cheap, and clones share them.
///
/// [`FrozenLinears`](crate::FrozenLinears) computes with it what it computes with the tensor in bf16, bit for bit.
#[derive(Clone, Debug)]
pub struct PackedMatrix(Arc<Panels>);

#[derive(Debug)]
struct Panels {
    dims: [usize; 2],
    panels: FrozenPanels,
}

impl PackedMatrix {
    /// The panels of `weight`, or `None` where products do not read them: on another device than Flex, in another type than
    /// `f32`, on a processor without bf16 instructions, or of a weight that is trained.
    pub fn new(weight: &Tensor<2>) -> Option<Self> {
        let dims = weight.dims();
        let values = frozen(weight)?;
        let panels = FrozenPanels::pack(floats(&values), dims[0], dims[1])?;
        Some(Self(Arc::new(Panels { dims, panels })))
    }

    /// `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        self.0.dims
    }

    /// The weight as it was rounded to bf16, as an `f32` tensor on Flex.
    pub fn to_tensor(&self) -> Tensor<2> {
        let [outputs, inputs] = self.0.dims;
        let values = self.0.panels.unpack(outputs, inputs);
        Tensor::from_data(TensorData::new(values, self.0.dims), &Device::flex())
    }

    /// Whether the two are clones of one another.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn panels(&self) -> &FrozenPanels {
        &self.0.panels
    }
}
