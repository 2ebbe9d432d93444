//! What attention needs to know of a tree-packed batch, computed once for all layers.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, Device, Tensor, TensorData};
use pivotal_kernels::{AttentionPlan, AttentionShape, Precision, RopeTable, Span};

/// A layout that cannot be attended over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A span that does not begin where the one before it ended.
    #[error("span {index} starts at token {start}, expected {expected}: spans must tile the pack")]
    Gap {
        /// Which span.
        index: usize,
        /// Where it starts.
        start: usize,
        /// Where the span before it ended.
        expected: usize,
    },
    /// A prefix that is not wholly before its span.
    #[error(
        "span {index} starts at token {start} but its prefix ends at {prefix_end}: a prefix must come first"
    )]
    PrefixAfterSpan {
        /// Which span.
        index: usize,
        /// Where it starts.
        start: usize,
        /// Where its prefix ends.
        prefix_end: usize,
    },
    /// Query heads that do not divide evenly among the key heads.
    #[error("`heads` is {heads}, expected a positive multiple of `kv_heads` ({kv_heads})")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
    },
    /// Rotary frequencies that do not fit the head.
    #[error(
        "`inverse_frequencies` has {found} entries for a `head_dim` of {head_dim}, expected {}",
        head_dim / 2
    )]
    Frequencies {
        /// How many there are.
        found: usize,
        /// Size of a head; must be even and positive.
        head_dim: usize,
    },
}

/// Spans, rotary tables and head counts of one batch: built once, used by every layer.
///
/// Cloning is cheap: the content is shared.
#[derive(Clone, Debug)]
pub struct AttentionLayout {
    plan: Arc<LayoutPlan>,
}

#[derive(Debug)]
pub(crate) struct LayoutPlan {
    pub(crate) attention: AttentionPlan,
    pub(crate) rope: RopeTable,
    spans: Vec<Span>,
    inverse_frequencies: Vec<f32>,
    rope_attention_scale: f32,
    device: Device,
    dense: OnceLock<DenseLayout>,
}

/// The tensors that the portable body needs; the fused one never builds them.
#[derive(Debug)]
pub(crate) struct DenseLayout {
    /// `[tokens, 1, head_dim / 2]`.
    pub(crate) cos: Tensor<3>,
    pub(crate) sin: Tensor<3>,
    /// `[1, tokens, tokens]`; true where the query (second axis) must not see the key (third axis).
    pub(crate) hidden: Tensor<3, Bool>,
}

impl AttentionLayout {
    /// The layout of a pack whose spans are `spans`, in order.
    ///
    /// Token `i` of a span has the position `prefix_len + i`. `inverse_frequencies` are those of the rotary embedding,
    /// already scaled (Llama 3, YaRN, ...), one for each pair of channels; `rope_attention_scale` multiplies cosine and
    /// sine (1 but for YaRN). Rotation is in halves: channel `i` pairs with `i + head_dim / 2`, as in Hugging Face's Llama.
    ///
    /// # Errors
    /// [`LayoutError`] if the spans do not tile the pack, a prefix does not precede its span, `heads` is no multiple of
    /// `kv_heads`, or there are not `head_dim / 2` frequencies.
    ///
    /// # Examples
    /// ```
    /// use pivotal_ops::{AttentionLayout, AttentionSpan};
    /// let prompt = AttentionSpan { start: 0, len: 3, prefix_start: 0, prefix_len: 0 };
    /// let response = AttentionSpan { start: 3, len: 2, prefix_start: 0, prefix_len: 3 };
    /// let device = burn::tensor::Device::flex();
    /// let layout = AttentionLayout::new(&[prompt, response], 4, 2, 4, &[1.0, 0.01], 1.0, &device).unwrap();
    /// assert_eq!(layout.tokens(), 5);
    /// ```
    pub fn new(
        spans: &[Span],
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        inverse_frequencies: &[f32],
        rope_attention_scale: f32,
        device: &Device,
    ) -> Result<Self, LayoutError> {
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(LayoutError::Heads { heads, kv_heads });
        }
        let half = inverse_frequencies.len();
        if head_dim == 0 || head_dim != 2 * half {
            return Err(LayoutError::Frequencies {
                found: half,
                head_dim,
            });
        }
        let tokens = check_spans(spans)?;
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
        };
        Ok(Self {
            plan: Arc::new(LayoutPlan {
                attention: AttentionPlan::new(spans, tokens, shape),
                rope: RopeTable::new(inverse_frequencies, &positions(spans), rope_attention_scale),
                spans: spans.to_vec(),
                inverse_frequencies: inverse_frequencies.to_vec(),
                rope_attention_scale,
                device: device.clone().without_autodiff(),
                dense: OnceLock::new(),
            }),
        })
    }

    /// The same layout with the operands of attention's products rounded like this; they are f32 otherwise.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        // Only a layout that nobody shares yet is taken apart; a shared one is made again from what it was made of.
        let plan = match Arc::try_unwrap(self.plan) {
            Ok(plan) => LayoutPlan {
                attention: plan.attention.with_precision(precision),
                ..plan
            },
            Err(shared) => LayoutPlan {
                attention: shared.attention.clone().with_precision(precision),
                rope: shared.rope.clone(),
                spans: shared.spans.clone(),
                inverse_frequencies: shared.inverse_frequencies.clone(),
                rope_attention_scale: shared.rope_attention_scale,
                device: shared.device.clone(),
                dense: OnceLock::new(),
            },
        };
        Self {
            plan: Arc::new(plan),
        }
    }

    /// Tokens in the pack.
    pub fn tokens(&self) -> usize {
        self.plan.attention.tokens()
    }

    /// Query heads.
    pub fn heads(&self) -> usize {
        self.plan.attention.shape().heads
    }

    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.plan.attention.shape().kv_heads
    }

    /// Channels in a head.
    pub fn head_dim(&self) -> usize {
        self.plan.attention.shape().head_dim
    }

    pub(crate) fn plan(&self) -> &Arc<LayoutPlan> {
        &self.plan
    }

    pub(crate) fn dense(&self) -> &DenseLayout {
        let plan = &self.plan;
        plan.dense.get_or_init(|| {
            let tokens = self.tokens();
            let angles: Vec<f64> = positions(&plan.spans)
                .into_iter()
                .flat_map(|position| {
                    let angle = move |f: &f32| f64::from(f * position as f32);
                    plan.inverse_frequencies.iter().map(angle)
                })
                .collect();
            let scale = f64::from(plan.rope_attention_scale);
            let table = |value: fn(f64) -> f64| {
                let values: Vec<f64> = angles.iter().map(|&angle| value(angle) * scale).collect();
                let data = TensorData::new(values, [tokens, 1, self.head_dim() / 2]);
                Tensor::from_data(data, &plan.device)
            };
            let mut hidden = vec![true; tokens * tokens];
            for span in &plan.spans {
                for i in 0..span.len {
                    let row = &mut hidden[(span.start + i) * tokens..][..tokens];
                    row[span.prefix_start..span.prefix_start + span.prefix_len].fill(false);
                    row[span.start..=span.start + i].fill(false);
                }
            }
            let hidden = TensorData::new(hidden, [1, tokens, tokens]);
            DenseLayout {
                cos: table(f64::cos),
                sin: table(f64::sin),
                hidden: Tensor::from_data(hidden, &plan.device),
            }
        })
    }
}

fn positions(spans: &[Span]) -> Vec<usize> {
    spans
        .iter()
        .flat_map(|span| span.prefix_len..span.prefix_len + span.len)
        .collect()
}

fn check_spans(spans: &[Span]) -> Result<usize, LayoutError> {
    let mut end = 0;
    for (index, span) in spans.iter().enumerate() {
        if span.start != end {
            return Err(LayoutError::Gap {
                index,
                start: span.start,
                expected: end,
            });
        }
        let prefix_end = span.prefix_start + span.prefix_len;
        if span.prefix_len > 0 && prefix_end > span.start {
            return Err(LayoutError::PrefixAfterSpan {
                index,
                start: span.start,
                prefix_end,
            });
        }
        end += span.len;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: usize, len: usize, prefix_start: usize, prefix_len: usize) -> Span {
        Span {
            start,
            len,
            prefix_start,
            prefix_len,
        }
    }

    fn layout(spans: &[Span]) -> Result<AttentionLayout, LayoutError> {
        AttentionLayout::new(spans, 4, 2, 4, &[1.0, 0.5], 1.0, &Device::flex())
    }

    #[test]
    fn refuses_what_cannot_be_attended_over() {
        let gap = layout(&[span(0, 2, 0, 0), span(3, 1, 0, 2)]).unwrap_err();
        assert_eq!(
            gap.to_string(),
            "span 1 starts at token 3, expected 2: spans must tile the pack"
        );
        let late = layout(&[span(0, 2, 0, 0), span(2, 1, 1, 2)]).unwrap_err();
        assert_eq!(
            late,
            LayoutError::PrefixAfterSpan {
                index: 1,
                start: 2,
                prefix_end: 3
            }
        );
        let device = Device::flex();
        let heads = AttentionLayout::new(&[], 3, 2, 4, &[1.0, 0.5], 1.0, &device).unwrap_err();
        assert_eq!(
            heads,
            LayoutError::Heads {
                heads: 3,
                kv_heads: 2
            }
        );
        let odd = AttentionLayout::new(&[], 2, 2, 5, &[1.0, 0.5], 1.0, &device).unwrap_err();
        assert_eq!(
            odd.to_string(),
            "`inverse_frequencies` has 2 entries for a `head_dim` of 5, expected 2"
        );
    }

    #[test]
    fn a_response_goes_on_where_its_prefix_ends() {
        let layout = layout(&[span(0, 2, 0, 0), span(2, 1, 0, 2), span(3, 1, 0, 2)]).unwrap();
        let cos: Vec<f32> = layout.dense().cos.clone().try_into_vec_as().unwrap();
        assert_eq!(cos[4..6], cos[6..8]);
        assert_eq!(cos[4], 2.0f64.cos() as f32);
        let mut x = vec![1.0; 4 * 4];
        layout.plan().rope.apply(&mut x, 1);
        assert_eq!(x[8..12], x[12..16]);
    }
}
