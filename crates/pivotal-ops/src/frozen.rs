//! Linear layers that share an input and are not trained: what makes LoRA training fast on the processor.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;
use burn::backend::{Dispatch, Flex};
use burn::tensor::{DType, Int, Tensor};
use pivotal_kernels::{FrozenLinear, FrozenPanels, Precision};

use crate::extension::FusedOps;
use crate::flex::floats;
use crate::packed_matrix::PackedMatrix;

/// What is done to the input of [`FrozenLinears`] before the first product.
#[derive(Clone, Copy, Debug)]
pub enum FrozenInput<'a> {
    /// Nothing.
    Plain,
    /// [`rms_norm`](crate::rms_norm) with this gain and `eps`.
    Normed {
        /// `[in]`.
        weight: &'a Tensor<1>,
        /// Added to the mean square.
        eps: f32,
    },
    /// [`swiglu`](crate::swiglu) of a row's first half (the gates) and second half.
    Gated,
}

/// A weight that is not trained, `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub enum FrozenWeight<'a> {
    /// With every bit it has.
    Tensor(&'a Tensor<2>),
    /// What bf16 products read of it: layers made of such multiply in [`Precision::Bf16`] only.
    Packed(&'a PackedMatrix),
}

/// A frozen layer: its weight, and `[out]` if it has a bias.
pub type FrozenLayer<'a> = (FrozenWeight<'a>, Option<&'a Tensor<1>>);

/// A trained update of one of the layers: `scale · B A` (Hu et al. 2021, arXiv:2106.09685).
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// `[rank, in]`.
    pub a: &'a Tensor<2>,
    /// `[out, rank]`.
    pub b: &'a Tensor<2>,
    /// `alpha / rank`.
    pub scale: f32,
}

/// Frozen linear layers that share an input, on Flex in `f32`; bf16 packs of their weights are made at first use and kept.
///
/// Cloning is cheap, and clones share the packs.
#[derive(Clone, Debug)]
pub struct FrozenLinears {
    weights: Arc<FrozenWeights>,
}

#[derive(Debug)]
pub(crate) struct FrozenWeights {
    pub(crate) input: Prologue,
    pub(crate) inputs: usize,
    layers: Vec<Layer>,
}

#[derive(Debug)]
pub(crate) enum Prologue {
    Plain,
    Normed { weight: FlexTensor, eps: f32 },
    Gated,
}

#[derive(Debug)]
struct Layer {
    weight: LayerWeight,
    bias: Option<FlexTensor>,
    outputs: usize,
}

#[derive(Debug)]
enum LayerWeight {
    Tensor(FlexTensor, FrozenPanels),
    Packed(PackedMatrix),
}

/// What one application needs besides its tensors.
#[derive(Clone, Debug)]
pub(crate) struct FrozenJob {
    pub(crate) weights: Arc<FrozenWeights>,
    /// Which layers have an update; none if there is none.
    pub(crate) adapted: Vec<bool>,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    pub(crate) precision: Precision,
}

/// What one application of [`FrozenLinears::mlp`] needs besides its tensors.
#[derive(Clone, Debug)]
pub(crate) struct MlpJob {
    pub(crate) gate_up: Arc<FrozenJob>,
    pub(crate) down: Arc<FrozenJob>,
}

impl FrozenLinears {
    /// The layers, or `None` where there is no kernel for them: on another device than Flex, in another type than `f32`, with
    /// a tensor that is trained, or of different input widths.
    pub fn new(input: FrozenInput<'_>, layers: &[FrozenLayer<'_>]) -> Option<Self> {
        let (first, _) = layers.first()?;
        let [_, inputs] = first.dims();
        let input = match input {
            FrozenInput::Plain => Prologue::Plain,
            FrozenInput::Gated => Prologue::Gated,
            FrozenInput::Normed { weight, eps } => Prologue::Normed {
                weight: frozen(weight)?,
                eps,
            },
        };
        let layer = |(weight, bias): &FrozenLayer<'_>| {
            let [outputs, width] = weight.dims();
            let kept = match *weight {
                FrozenWeight::Tensor(weight) => {
                    LayerWeight::Tensor(frozen(weight)?, FrozenPanels::default())
                }
                FrozenWeight::Packed(matrix) => LayerWeight::Packed(matrix.clone()),
            };
            (width == inputs).then_some(Layer {
                weight: kept,
                bias: match bias {
                    None => None,
                    Some(bias) => Some(frozen(bias)?),
                },
                outputs,
            })
        };
        Some(Self {
            weights: Arc::new(FrozenWeights {
                input,
                inputs,
                layers: layers.iter().map(layer).collect::<Option<_>>()?,
            }),
        })
    }

    /// Whether these are the tensors it was made of: the very same memory, which it keeps and nobody can change.
    pub fn is_made_of(&self, input: FrozenInput<'_>, layers: &[FrozenLayer<'_>]) -> bool {
        let same_input = match (&self.weights.input, input) {
            (Prologue::Plain, FrozenInput::Plain) | (Prologue::Gated, FrozenInput::Gated) => true,
            (
                Prologue::Normed { weight, eps },
                FrozenInput::Normed {
                    weight: other,
                    eps: value,
                },
            ) => same(weight, other) && eps.to_bits() == value.to_bits(),
            _ => false,
        };
        same_input
            && self.weights.layers.len() == layers.len()
            && self
                .weights
                .layers
                .iter()
                .zip(layers)
                .all(|(layer, (weight, bias))| {
                    layer.weight.is(weight)
                        && match (&layer.bias, bias) {
                            (None, None) => true,
                            (Some(layer), Some(bias)) => same(layer, bias),
                            _ => false,
                        }
                })
    }

    /// The layers' outputs side by side, `x Wᵀ + bias`, each with its update where it has one.
    ///
    /// With every `b` zero the result is that without updates, bit for bit.
    ///
    /// # Shapes
    /// `x` `[rows, in]`, or `[rows, 2 * in]` if gated; `updates` one entry a layer; returns `[rows, all outputs]`.
    ///
    /// # Panics
    /// If the shapes do not fit, or if updates differ in rank or scale: see [`FrozenLinears::takes`].
    pub fn forward(
        &self,
        x: Tensor<2>,
        updates: &[Option<LowRank<'_>>],
        precision: Precision,
    ) -> Tensor<2> {
        let width = self.weights.input_width();
        assert!(
            x.dims()[1] == width,
            "`x` is {} wide, expected {width}",
            x.dims()[1]
        );
        let (job, update) = self.application(updates, precision);
        Tensor::from_dispatch(match update {
            None => Dispatch::fused_frozen_linears(x.into_dispatch(), job),
            Some([a, b]) => Dispatch::fused_frozen_lora_linears(
                x.into_dispatch(),
                a.into_dispatch(),
                b.into_dispatch(),
                job,
            ),
        })
    }

    /// `x + down(gate_up(x))`, a residual gated perceptron in one operation: `gate_up` behind its norm, two layers as wide as
    /// each other, and `down` behind the gate.
    ///
    /// The value is that of [`FrozenLinears::forward`] of both and a sum, bit for bit. With bf16 operands the backward pass
    /// reads gates and ups rounded to bf16.
    ///
    /// # Shapes
    /// `x` `[rows, in]`; the updates one entry a layer; returns `[rows, in]`.
    ///
    /// # Panics
    /// As [`FrozenLinears::forward`], or if these are not the layers of a perceptron, or one of the two has updates and the
    /// other has none.
    pub fn mlp(
        gate_up: &Self,
        down: &Self,
        x: Tensor<2>,
        gate_up_updates: &[Option<LowRank<'_>>],
        down_updates: &[Option<LowRank<'_>>],
        precision: Precision,
    ) -> Tensor<2> {
        let width = gate_up.weights.inputs;
        assert!(
            x.dims()[1] == width,
            "`x` is {} wide, expected {width}",
            x.dims()[1]
        );
        let (gate_up, gate_up_update) = gate_up.application(gate_up_updates, precision);
        let (down, down_update) = down.application(down_updates, precision);
        let job = Arc::new(MlpJob { gate_up, down });
        let x = x.into_dispatch();
        Tensor::from_dispatch(match (gate_up_update, down_update) {
            (None, None) => Dispatch::fused_frozen_mlp(x, job),
            (Some(gate_up), Some(down)) => {
                let [gate_up_a, gate_up_b] = gate_up.map(Tensor::into_dispatch);
                let [down_a, down_b] = down.map(Tensor::into_dispatch);
                Dispatch::fused_frozen_lora_mlp(x, gate_up_a, gate_up_b, down_a, down_b, job)
            }
            _ => panic!("updates before the gate and none behind it, or the other way round"),
        })
    }

    /// One application, and the updates one below the other: `A` and `B`.
    #[track_caller]
    fn application(
        &self,
        updates: &[Option<LowRank<'_>>],
        precision: Precision,
    ) -> (Arc<FrozenJob>, Option<[Tensor<2>; 2]>) {
        assert!(
            self.takes(updates),
            "updates of different rank, scale or shape"
        );
        let present: Vec<_> = updates.iter().flatten().collect();
        let (rank, scale) = present
            .first()
            .map_or((0, 0.0), |first| (first.a.dims()[0], first.scale));
        let job = Arc::new(FrozenJob {
            weights: self.weights.clone(),
            adapted: updates.iter().map(Option::is_some).collect(),
            rank,
            scale,
            precision,
        });
        let joined = |parts: Vec<Tensor<2>>| match <[_; 1]>::try_from(parts) {
            Ok([only]) => only,
            Err(parts) => Tensor::cat(parts, 0),
        };
        let update = (!present.is_empty()).then(|| {
            [
                joined(present.iter().map(|update| update.a.clone()).collect()),
                joined(present.iter().map(|update| update.b.clone()).collect()),
            ]
        });
        (job, update)
    }

    /// Whether [`FrozenLinears::forward`] takes these updates: one entry a layer, of fitting shapes, and all of one rank and
    /// scale.
    pub fn takes(&self, updates: &[Option<LowRank<'_>>]) -> bool {
        let layers = &self.weights.layers;
        let mut present = updates.iter().flatten();
        let first = present.next();
        updates.len() == layers.len()
            && updates.iter().zip(layers).all(|(update, layer)| {
                update.is_none_or(|LowRank { a, b, scale }| {
                    let [rank, inputs] = a.dims();
                    inputs == self.weights.inputs
                        && b.dims() == [layer.outputs, rank]
                        && first.is_some_and(|first| {
                            first.a.dims()[0] == rank && first.scale.to_bits() == scale.to_bits()
                        })
                })
            })
    }

    /// [`token_logps`](crate::token_logps) with the only layer as the head.
    ///
    /// Where `hidden` is trained its gradient is computed in the forward pass, which saves the backward one a product.
    ///
    /// # Shapes
    /// `hidden` `[rows, in]`, `targets` `[rows]`; returns `[rows]`, in nats.
    ///
    /// # Panics
    /// If the shapes do not fit, a target is not below the layer's outputs, or this is not one plain layer without bias whose
    /// weight is a tensor.
    pub fn token_logps(
        &self,
        hidden: Tensor<2>,
        targets: Tensor<1, Int>,
        precision: Precision,
    ) -> Tensor<1> {
        let plain = matches!(self.weights.input, Prologue::Plain);
        let is_head =
            |layer: &Layer| layer.bias.is_none() && matches!(layer.weight, LayerWeight::Tensor(..));
        assert!(
            plain && matches!(&self.weights.layers[..], [layer] if is_head(layer)),
            "a head is one plain layer without bias, its weight a tensor"
        );
        assert!(
            hidden.dims() == [targets.dims()[0], self.weights.inputs],
            "`hidden` has another shape"
        );
        let job = Arc::new(FrozenJob {
            weights: self.weights.clone(),
            adapted: vec![false],
            rank: 0,
            scale: 0.0,
            precision,
        });
        Tensor::from_dispatch(Dispatch::fused_frozen_token_logps(
            hidden.into_dispatch(),
            targets.into_dispatch(),
            job,
        ))
    }
}

impl FrozenWeights {
    /// Length of an input row.
    fn input_width(&self) -> usize {
        match self.input {
            Prologue::Plain | Prologue::Normed { .. } => self.inputs,
            Prologue::Gated => 2 * self.inputs,
        }
    }

    /// Length of an output row.
    pub(crate) fn outputs(&self) -> usize {
        self.layers.iter().map(|layer| layer.outputs).sum()
    }
}

impl FrozenJob {
    /// The layers as the kernels take them.
    pub(crate) fn layers(&self) -> Vec<FrozenLinear<'_>> {
        let layers = self.weights.layers.iter().zip(&self.adapted);
        layers
            .map(|(layer, &adapted)| FrozenLinear {
                weight: layer.weight.values(),
                bias: layer.bias.as_ref().map(floats),
                panels: layer.weight.panels(),
                outputs: layer.outputs,
                adapted,
            })
            .collect()
    }

    /// The head's weight and panels, where the only layer is one.
    pub(crate) fn head(&self) -> (&[f32], &FrozenPanels) {
        let weight = &self.weights.layers[0].weight;
        let values = weight.values().expect("a head is a tensor");
        (values, weight.panels())
    }
}

impl FrozenWeight<'_> {
    fn dims(&self) -> [usize; 2] {
        match self {
            Self::Tensor(weight) => weight.dims(),
            Self::Packed(matrix) => matrix.dims(),
        }
    }
}

impl LayerWeight {
    fn is(&self, weight: &FrozenWeight<'_>) -> bool {
        match (self, weight) {
            (Self::Tensor(kept, _), FrozenWeight::Tensor(weight)) => same(kept, weight),
            (Self::Packed(kept), FrozenWeight::Packed(matrix)) => kept.is(matrix),
            _ => false,
        }
    }

    fn values(&self) -> Option<&[f32]> {
        match self {
            Self::Tensor(weight, _) => Some(floats(weight)),
            Self::Packed(_) => None,
        }
    }

    fn panels(&self) -> &FrozenPanels {
        match self {
            Self::Tensor(_, panels) => panels,
            Self::Packed(matrix) => matrix.panels(),
        }
    }
}

/// The memory of a tensor that is not trained, on Flex, in `f32`, its elements one after the other.
pub(crate) fn frozen<const D: usize>(tensor: &Tensor<D>) -> Option<FlexTensor> {
    if tensor.dtype() != DType::F32 {
        return None;
    }
    let tensor = tensor.clone().try_into_primitive::<Flex>().ok()?;
    tensor.as_slice::<f32>().is_some().then_some(tensor)
}

fn same<const D: usize>(kept: &FlexTensor, tensor: &Tensor<D>) -> bool {
    frozen(tensor).is_some_and(|tensor| std::ptr::eq(floats(kept), floats(&tensor)))
}
