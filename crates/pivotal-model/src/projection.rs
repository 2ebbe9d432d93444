//! A linear layer, and the low-rank update that may ride on it.

use burn::tensor::Tensor;
use pivotal_ops::{FrozenWeight, PackedMatrix, Precision};

use crate::parameter::{Parameter, Visitor, digest, off_tape, to_host};

/// `x Wᵀ + bias`, plus a low-rank update where there is one.
#[derive(Clone, Debug)]
pub(crate) struct Projection {
    pub(crate) weight: Weight,
    /// `[out]`.
    pub(crate) bias: Option<Tensor<1>>,
    pub(crate) adapter: Option<LowRank>,
}

/// A layer's weight, `[out, in]`.
#[expect(
    clippy::large_enum_variant,
    reason = "a model has a few hundred: 60 KB in all"
)]
#[derive(Clone, Debug)]
pub(crate) enum Weight {
    Tensor(Tensor<2>),
    Packed(PackedWeight),
}

/// A weight that is not trained and of which only bf16 panels are kept, with the digest of what it was.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    matrix: PackedMatrix,
    digest: String,
}

impl PackedWeight {
    /// `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        self.matrix.dims()
    }

    /// The weight as it was rounded to bf16, unpacked now.
    pub fn to_tensor(&self) -> Tensor<2> {
        self.matrix.to_tensor()
    }

    /// [`Parameter::digest`] of the weight before it was rounded.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// `scale · B A` on top of a weight (Hu et al. 2021, arXiv:2106.09685, Eq. 3).
#[derive(Clone, Debug)]
pub(crate) struct LowRank {
    /// `[rank, in]`.
    pub(crate) a: Tensor<2>,
    /// `[out, rank]`.
    pub(crate) b: Tensor<2>,
    /// `alpha / rank`, or `alpha / √rank` for a rank-stabilised adapter.
    pub(crate) scale: f32,
}

impl Projection {
    pub(crate) fn forward(&self, x: Tensor<2>, precision: Precision) -> Tensor<2> {
        let weight = self.weight.tensor();
        let y = match &self.adapter {
            None => pivotal_ops::linear(x, weight, precision),
            Some(LowRank { a, b, scale }) => {
                pivotal_ops::lora_linear(x, weight, a.clone(), b.clone(), *scale, precision)
            }
        };
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// The weight with the update added in, off the tape, `[out, in]`.
    pub(crate) fn merged_weight(&self) -> Tensor<2> {
        let weight = off_tape(self.weight.tensor());
        match &self.adapter {
            None => weight,
            Some(LowRank { a, b, scale }) => {
                let (a, b) = (off_tape(a.clone()), off_tape(b.clone()));
                weight + b.matmul(a).mul_scalar(*scale)
            }
        }
    }

    /// `[out, in]`.
    pub(crate) fn shape(&self) -> [usize; 2] {
        match &self.weight {
            Weight::Tensor(weight) => weight.dims(),
            Weight::Packed(packed) => packed.dims(),
        }
    }

    /// The weight and the bias, as frozen layers take them.
    pub(crate) fn frozen(&self) -> (FrozenWeight<'_>, Option<&Tensor<1>>) {
        let weight = match &self.weight {
            Weight::Tensor(weight) => FrozenWeight::Tensor(weight),
            Weight::Packed(packed) => FrozenWeight::Packed(&packed.matrix),
        };
        (weight, self.bias.as_ref())
    }

    /// Keeps of the weight only what bf16 products read, where it is frozen and they are to be had.
    pub(crate) fn pack(&mut self) {
        if let Weight::Tensor(weight) = &self.weight
            && let Some(matrix) = PackedMatrix::new(weight)
        {
            let digest = digest(to_host(weight.clone()).values());
            self.weight = Weight::Packed(PackedWeight { matrix, digest });
        }
    }

    pub(crate) fn visit(&mut self, path: &str, visit: &mut Visitor<'_>) {
        let weight = match &mut self.weight {
            Weight::Tensor(weight) => Parameter::Matrix(weight),
            Weight::Packed(packed) => Parameter::Packed(packed),
        };
        visit(&format!("{path}.weight"), weight);
        if let Some(bias) = &mut self.bias {
            visit(&format!("{path}.bias"), Parameter::Vector(bias));
        }
        if let Some(adapter) = &mut self.adapter {
            visit(
                &format!("{path}.lora_A.weight"),
                Parameter::Matrix(&mut adapter.a),
            );
            visit(
                &format!("{path}.lora_B.weight"),
                Parameter::Matrix(&mut adapter.b),
            );
        }
    }
}

impl Weight {
    /// The weight as a tensor; a packed one as it was rounded, unpacked now.
    pub(crate) fn tensor(&self) -> Tensor<2> {
        match self {
            Self::Tensor(weight) => weight.clone(),
            Self::Packed(packed) => packed.to_tensor(),
        }
    }
}
