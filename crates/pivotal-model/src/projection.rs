//! A linear layer, and the low-rank update that may ride on it.

use burn::tensor::Tensor;
use pivotal_ops::Precision;

use crate::parameter::{Parameter, Visitor, off_tape};

/// `x Wᵀ + bias`, plus a low-rank update where there is one.
#[derive(Clone, Debug)]
pub(crate) struct Projection {
    /// `[out, in]`.
    pub(crate) weight: Tensor<2>,
    /// `[out]`.
    pub(crate) bias: Option<Tensor<1>>,
    pub(crate) adapter: Option<LowRank>,
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
        let weight = self.weight.clone();
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
        let weight = off_tape(self.weight.clone());
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
        self.weight.dims()
    }

    pub(crate) fn visit(&mut self, path: &str, visit: &mut Visitor<'_>) {
        visit(
            &format!("{path}.weight"),
            Parameter::Matrix(&mut self.weight),
        );
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
