//! A decoder's weights packed for decoding, and adapters that ride on them.

use burn::tensor::Tensor;
use pivotal_kernels::{GATE_BLOCK, PackedWeight, Precision, add_into};

use crate::decode::sized;
use crate::decoder::{Decoder, Layer};
use crate::parameter::{off_tape, to_host};
use crate::projection::{LowRank, Projection};

#[derive(Debug)]
pub(crate) struct PackedDecoder {
    pub(crate) layers: Vec<PackedLayer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: PackedWeight,
}

#[derive(Debug)]
pub(crate) struct PackedLayer {
    pub(crate) input_layernorm: Vec<f32>,
    /// q, k and v in one product.
    pub(crate) qkv: PackedLinear,
    pub(crate) o_proj: PackedLinear,
    pub(crate) post_attention_layernorm: Vec<f32>,
    pub(crate) gate_up: PackedLinear,
    pub(crate) down_proj: PackedLinear,
}

/// Linear layers of one input, their outputs side by side.
#[derive(Debug)]
pub(crate) struct PackedLinear {
    pub(crate) weight: PackedWeight,
    /// Empty, or an element for every output.
    bias: Vec<f32>,
}

/// The adapters of a layer; absent where a group of linear layers has none.
#[derive(Clone, Debug, Default)]
pub(crate) struct LayerAdapters {
    pub(crate) qkv: Option<PackedAdapter>,
    pub(crate) o_proj: Option<PackedAdapter>,
    pub(crate) gate_up: Option<PackedAdapter>,
    pub(crate) down_proj: Option<PackedAdapter>,
}

/// The low-rank updates of linear layers of one input.
#[derive(Clone, Debug)]
pub(crate) struct PackedAdapter {
    /// All `A`, one below the other: `[ranks, inputs]`.
    a: PackedWeight,
    /// All `scale · B` on a diagonal: `[outputs, ranks]`.
    b: PackedWeight,
}

impl PackedDecoder {
    pub(crate) fn new(decoder: &Decoder, precision: Precision, merge: bool) -> Self {
        let layers = decoder.layers.iter();
        let head = values(decoder.head());
        let [vocab, hidden] = decoder.head().dims();
        Self {
            layers: layers
                .map(|layer| PackedLayer::new(layer, precision, merge))
                .collect(),
            norm: values(&decoder.norm),
            head: PackedWeight::new(&head, vocab, hidden, precision),
        }
    }
}

impl PackedLayer {
    fn new(layer: &Layer, precision: Precision, merge: bool) -> Self {
        let pack = |projections: &[&Projection]| PackedLinear::new(projections, precision, merge);
        Self {
            input_layernorm: values(&layer.input_layernorm),
            qkv: pack(&[&layer.q_proj, &layer.k_proj, &layer.v_proj]),
            o_proj: pack(&[&layer.o_proj]),
            post_attention_layernorm: values(&layer.post_attention_layernorm),
            gate_up: PackedLinear::gated(&layer.gate_proj, &layer.up_proj, precision, merge),
            down_proj: pack(&[&layer.down_proj]),
        }
    }
}

impl PackedLinear {
    fn new(projections: &[&Projection], precision: Precision, merge: bool) -> Self {
        let rows: Vec<f32> = projections
            .iter()
            .flat_map(|projection| weight_rows(projection, merge))
            .collect();
        let biases = projections.iter().filter_map(|p| p.bias.as_ref());
        let inputs = projections[0].shape()[1];
        Self {
            weight: PackedWeight::new(&rows, rows.len() / inputs, inputs, precision),
            bias: biases.flat_map(values).collect(),
        }
    }

    /// The outputs as [`swiglu_interleaved_forward`](pivotal_kernels::swiglu_interleaved_forward) reads them.
    fn gated(gate: &Projection, up: &Projection, precision: Precision, merge: bool) -> Self {
        let [outputs, inputs] = gate.shape();
        let rows = interleaved(&weight_rows(gate, merge), &weight_rows(up, merge), inputs);
        let bias = match (&gate.bias, &up.bias) {
            (Some(gate), Some(up)) => interleaved(&values(gate), &values(up), 1),
            _ => Vec::new(),
        };
        Self {
            weight: PackedWeight::new(&rows, 2 * outputs, inputs, precision),
            bias,
        }
    }

    /// `next` is what is multiplied by after this; `low` is scratch.
    pub(crate) fn forward(
        &self,
        adapter: &Option<PackedAdapter>,
        next: &PackedWeight,
        x: &[f32],
        rows: usize,
        low: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        self.weight.forward_before(next, x, rows, out);
        if let Some(PackedAdapter { a, b }) = adapter {
            let low = sized(low, rows * a.outputs());
            a.forward(x, rows, low);
            b.forward_add(low, rows, out);
        }
        if !self.bias.is_empty() {
            out.chunks_exact_mut(self.bias.len())
                .for_each(|row| add_into(row, &self.bias));
        }
    }
}

impl LayerAdapters {
    pub(crate) fn new(layer: &Layer, precision: Precision) -> Self {
        let pack = |projections: &[&Projection]| PackedAdapter::new(projections, precision);
        Self {
            qkv: pack(&[&layer.q_proj, &layer.k_proj, &layer.v_proj]),
            o_proj: pack(&[&layer.o_proj]),
            gate_up: PackedAdapter::gated(&layer.gate_proj, &layer.up_proj, precision),
            down_proj: pack(&[&layer.down_proj]),
        }
    }

    /// Whether a layer has an adapter anywhere.
    pub(crate) fn adapted(layer: &Layer) -> bool {
        let projections = [
            &layer.q_proj,
            &layer.k_proj,
            &layer.v_proj,
            &layer.o_proj,
            &layer.gate_proj,
            &layer.up_proj,
            &layer.down_proj,
        ];
        projections.iter().any(|p| p.adapter.is_some())
    }
}

impl PackedAdapter {
    fn new(projections: &[&Projection], precision: Precision) -> Option<Self> {
        Self::ordered(projections, precision, |diagonal, _| diagonal)
    }

    /// The outputs interleaved, as [`PackedLinear::gated`] has them.
    fn gated(gate: &Projection, up: &Projection, precision: Precision) -> Option<Self> {
        Self::ordered(&[gate, up], precision, |diagonal, ranks| {
            let (gate, up) = diagonal.split_at(diagonal.len() / 2);
            interleaved(gate, up, ranks)
        })
    }

    /// `order` gets `scale · B`, `[outputs, ranks]`, and the ranks.
    fn ordered(
        projections: &[&Projection],
        precision: Precision,
        order: impl FnOnce(Vec<f32>, usize) -> Vec<f32>,
    ) -> Option<Self> {
        let rank = |p: &Projection| p.adapter.as_ref().map_or(0, |low| low.a.dims()[0]);
        let ranks: usize = projections.iter().map(|p| rank(p)).sum();
        if ranks == 0 {
            return None;
        }
        let inputs = projections[0].shape()[1];
        let (mut below, mut diagonal, mut outputs, mut first) = (Vec::new(), Vec::new(), 0, 0);
        for projection in projections {
            let from = outputs;
            outputs += projection.shape()[0];
            diagonal.resize(outputs * ranks, 0.0);
            if let Some(LowRank { a, b, scale }) = &projection.adapter {
                below.extend(values(a));
                let rank = rank(projection);
                for (row, b) in values(b).chunks_exact(rank).enumerate() {
                    let diagonal = &mut diagonal[(from + row) * ranks + first..][..rank];
                    diagonal
                        .iter_mut()
                        .zip(b)
                        .for_each(|(to, b)| *to = b * scale);
                }
                first += rank;
            }
        }
        let diagonal = order(diagonal, ranks);
        Some(Self {
            a: PackedWeight::replaceable(&below, ranks, inputs, precision),
            b: PackedWeight::replaceable(&diagonal, outputs, ranks, precision),
        })
    }
}

fn weight_rows(projection: &Projection, merge: bool) -> Vec<f32> {
    match merge {
        true => values(&projection.merged_weight()),
        false => values(&off_tape(projection.weight.tensor())),
    }
}

/// [`GATE_BLOCK`] rows of gates, their ups, the next gates, and so on; rows are `width` long.
fn interleaved(gates: &[f32], ups: &[f32], width: usize) -> Vec<f32> {
    let block = (GATE_BLOCK * width).max(1);
    let blocks = gates.chunks(block).zip(ups.chunks(block));
    blocks
        .flat_map(|(gates, ups)| [gates, ups].concat())
        .collect()
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    to_host(tensor.clone()).into_values()
}
