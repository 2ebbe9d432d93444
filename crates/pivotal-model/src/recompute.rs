//! A forward pass whose first layers run again in the backward pass, so that only their inputs are kept between the two
//! (Chen et al. 2016, arXiv:1604.06174).
//!
//! ```text
//! forward:  embed ▶ layer 0 … r−1 off the tape, inputs kept ▶ leaf ▶ layer r … on the tape ▶ norm ▶ loss
//! backward: loss.backward() gives d(leaf); then for r−1 … 0: the layer again, on a tape of its own
//! ```
//!
//! The same operations meet the same numbers, so gradients are those of the kept pass bit for bit. A recomputed layer
//! costs one more forward pass of it, about a third of its whole cost, less where weights are frozen.

use burn::tensor::{Gradients, Int, Tensor};
use pivotal_core::Pack;
use pivotal_ops::AttentionLayout;

use crate::config::DecoderConfig;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;
use crate::parameter::{Parameter, Parameters, Visitor, on_tape};

/// A forward pass that [`ForwardPass::backward`] differentiates.
#[derive(Debug)]
pub struct ForwardPass {
    /// Hidden states after the last norm, `[tokens, hidden]` or `[read, hidden]`: what [`Decoder::hidden`] gives.
    pub hidden: Tensor<2>,
    again: Option<Again>,
}

/// What the layers off the tape leave behind.
#[derive(Debug)]
struct Again {
    /// The states above them, where the tape begins.
    leaf: Tensor<2>,
    /// The first of them that has a gradient to compute.
    first: usize,
    /// The input of each layer from `first` on.
    inputs: Vec<Tensor<2>>,
    layout: AttentionLayout,
    read: Option<Tensor<1, Int>>,
    ids: Tensor<1, Int>,
}

impl Decoder {
    /// [`Decoder::hidden`], with the first `recomputed` layers to be computed again in the backward pass.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    ///
    /// # Panics
    /// If there are fewer layers.
    pub fn forward(&self, pack: &Pack, recomputed: usize) -> Result<ForwardPass> {
        let first = self.first_trainable_layer();
        if first >= recomputed {
            let hidden = self.hidden(pack)?;
            return Ok(ForwardPass {
                hidden,
                again: None,
            });
        }
        self.check(pack)?;
        let (layout, ids) = (self.layout(pack), self.token_ids(pack));
        let read = self.read(pack);
        let below = self.detached();
        let mut x = below.embed_tokens.clone().select(0, ids.clone());
        let mut inputs = Vec::with_capacity(recomputed - first);
        for index in 0..recomputed {
            if index >= first {
                inputs.push(x.clone());
            }
            x = below.layer(index, x, &layout, read.as_ref());
        }
        let leaf = on_tape(x);
        let mut x = leaf.clone();
        for index in recomputed..self.layers.len() {
            x = self.layer(index, x, &layout, read.as_ref());
        }
        let hidden = pivotal_ops::rms_norm(x, self.norm.clone(), self.eps());
        Ok(ForwardPass {
            hidden,
            again: Some(Again {
                leaf,
                first,
                inputs,
                layout,
                read,
                ids,
            }),
        })
    }

    /// How many layers must be computed again for the others' activations over `tokens` tokens to fit in `bytes`.
    pub fn recomputed_layers(&self, tokens: usize, bytes: usize) -> usize {
        let layers = self.config().layers;
        let of_layer = tokens.saturating_mul(activation_bytes(self.config()));
        layers - (bytes / of_layer.max(1)).min(layers)
    }

    /// The lowest layer that a gradient must reach; as many as there are layers if it is none.
    fn first_trainable_layer(&self) -> usize {
        if self.embed_tokens.is_require_grad() {
            return 0;
        }
        let trainable = |layer: &Layer| {
            let mut found = false;
            layer.clone().visit("", &mut |_, parameter| {
                found |= parameter.is_trainable();
            });
            found
        };
        let first = self.layers.iter().position(trainable);
        first.unwrap_or(self.layers.len())
    }
}

/// Bytes that a layer keeps of each token for its backward pass: the inputs of its norms, products, attention and gate.
fn activation_bytes(config: &DecoderConfig) -> usize {
    let attention = 2 * (config.heads + config.kv_heads) * config.head_dim;
    size_of::<f32>() * (4 * config.hidden_size + attention + 3 * config.intermediate_size)
}

impl ForwardPass {
    /// Differentiates `loss`, which was made of this pass's hidden states by `model`.
    ///
    /// `take` is shown gradients together with the part of the model that they are of; each parameter's gradient is in
    /// one call at most, whole. Between calls only that part's gradients are in memory.
    ///
    /// # Panics
    /// If no parameter has a part in the loss.
    pub fn backward<M: Parameters + AsMut<Decoder>>(
        self,
        model: &mut M,
        loss: Tensor<1>,
        take: &mut dyn FnMut(&mut dyn Parameters, &Gradients),
    ) {
        let Self { hidden, again } = self;
        let mut gradients = loss.backward();
        drop((hidden, loss));
        let Some(again) = again else {
            return take(model, &gradients);
        };
        let mut dy = again.leaf.grad_remove(&mut gradients);
        let embed = model.as_mut().embed_tokens.clone();
        // Of a tied head; the embedding's own part is added below.
        let of_head = embed.grad_remove(&mut gradients);
        take(model, &gradients);
        drop(gradients);

        let decoder = model.as_mut();
        let lowest = match embed.is_require_grad() {
            true => None,
            false => Some(again.first),
        };
        let layers = (again.first..).zip(again.inputs);
        for (index, x) in layers.collect::<Vec<_>>().into_iter().rev() {
            let Some(dy_here) = dy.take() else { break };
            // Nothing below the lowest layer wants a gradient.
            let x = match lowest == Some(index) {
                true => x,
                false => on_tape(x),
            };
            let y = decoder.layer(index, x.clone(), &again.layout, again.read.as_ref());
            // The gradient of y ▸ Σ y·dy is dy itself.
            let mut gradients = (y * dy_here).backward();
            dy = x.grad_remove(&mut gradients);
            let path = format!("model.layers.{index}");
            let layer = &mut decoder.layers[index];
            take(&mut LayerPart { layer, path }, &gradients);
        }
        if let (Some(dy), None) = (dy, lowest) {
            let rows = embed.clone().select(0, again.ids);
            let mut gradients = (rows * dy).backward();
            if let (Some(of_rows), Some(of_head)) = (embed.grad(&gradients), of_head) {
                embed.grad_replace(&mut gradients, of_rows + of_head);
            }
            take(&mut EmbeddingPart(&mut decoder.embed_tokens), &gradients);
        }
    }
}

struct LayerPart<'a> {
    layer: &'a mut Layer,
    path: String,
}

impl Parameters for LayerPart<'_> {
    fn visit_parameters(&mut self, visit: &mut Visitor<'_>) {
        self.layer.visit(&self.path, visit);
    }
}

struct EmbeddingPart<'a>(&'a mut Tensor<2>);

impl Parameters for EmbeddingPart<'_> {
    fn visit_parameters(&mut self, visit: &mut Visitor<'_>) {
        visit("model.embed_tokens.weight", Parameter::Matrix(self.0));
    }
}

impl AsMut<Decoder> for Decoder {
    fn as_mut(&mut self) -> &mut Decoder {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_keeps_as_many_layers_as_fit_in_it() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama");
        let checkpoint = crate::load(&path).unwrap();
        let device = burn::tensor::Device::flex();
        let precision = pivotal_ops::Precision::F32;
        let decoder = Decoder::from_checkpoint(&checkpoint, &device, precision).unwrap();
        let layers = decoder.config().layers;
        let bytes = 10 * activation_bytes(decoder.config());
        assert!(layers > 1);
        assert_eq!(decoder.recomputed_layers(10, 0), layers);
        assert_eq!(decoder.recomputed_layers(10, bytes - 1), layers);
        assert_eq!(decoder.recomputed_layers(10, bytes), layers - 1);
        assert_eq!(decoder.recomputed_layers(10, layers * bytes), 0);
        assert_eq!(decoder.recomputed_layers(10, usize::MAX), 0);
        assert_eq!(decoder.recomputed_layers(0, 0), layers);
    }

    #[test]
    fn frozen_layers_below_the_first_trained_one_keep_nothing() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama");
        let checkpoint = crate::load(&path).unwrap();
        let device = burn::tensor::Device::flex();
        let precision = pivotal_ops::Precision::F32;
        let mut decoder = Decoder::from_checkpoint(&checkpoint, &device, precision).unwrap();
        let layers = decoder.config().layers;
        assert_eq!(decoder.first_trainable_layer(), layers);
        let last = &mut decoder.layers[layers - 1];
        last.input_layernorm = on_tape(last.input_layernorm.clone());
        assert_eq!(decoder.first_trainable_layer(), layers - 1);
        let mut pack = Pack::default();
        pack.push(&[1, 2], &[&[3, 4]]).unwrap();
        let pass = decoder.forward(&pack, layers).unwrap();
        assert_eq!(pass.again.as_ref().unwrap().inputs.len(), 1);
        let loss = pass.hidden.clone().sum();
        let mut names = Vec::new();
        pass.backward(&mut decoder, loss, &mut |part, gradients| {
            part.visit_parameters(&mut |name, parameter| {
                if let Parameter::Vector(tensor) = parameter
                    && tensor.grad(gradients).is_some()
                {
                    names.push(name.to_owned());
                }
            });
        });
        let name = format!("model.layers.{}.input_layernorm.weight", layers - 1);
        assert_eq!(names, [name]);
    }
}
