//! A frozen weight's panels, beside it or in its place.

#[cfg(target_arch = "x86_64")]
use std::borrow::Cow;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::FrozenLinear;
#[cfg(target_arch = "x86_64")]
use crate::lasting::LastingFloats;
#[cfg(target_arch = "x86_64")]
use crate::panels::{COLUMNS, Source, pack, packed_words, unpack_columns};
use crate::parallel::{check_matrix, zeros};

/// A frozen weight's bf16 panels: made at first use or by [`FrozenPanels::pack`], kept as long as this value.
///
/// They belong to the weight that was given first; hand in another one's and the products are wrong.
#[derive(Debug, Default)]
pub struct FrozenPanels {
    /// For `x Wᵀ`.
    #[cfg(target_arch = "x86_64")]
    forward: OnceLock<LastingFloats>,
    /// For `dy W`.
    #[cfg(target_arch = "x86_64")]
    backward: OnceLock<LastingFloats>,
}

impl FrozenPanels {
    /// The panels of `weight`, so that it need not be kept: they are then all there is of it, rounded to bf16.
    ///
    /// `None` where [`bf16_available`](crate::bf16_available) is false, for products there read the weight itself.
    ///
    /// # Shapes
    /// `weight` `[outputs, inputs]`.
    ///
    /// # Panics
    /// If `weight` has another length.
    ///
    /// # Examples
    /// ```
    /// use pivotal_kernels::{FrozenPanels, bf16_available};
    /// let panels = FrozenPanels::pack(&[1.0, 2.0, 3.0, 1.001], 2, 2);
    /// assert_eq!(panels.is_some(), bf16_available());
    /// if let Some(panels) = panels {
    ///     assert_eq!(panels.unpack(2, 2), [1.0, 2.0, 3.0, 1.0]);
    /// }
    /// ```
    #[must_use]
    pub fn pack(weight: &[f32], outputs: usize, inputs: usize) -> Option<Self> {
        check_matrix("weight", weight, outputs, inputs);
        #[cfg(target_arch = "x86_64")]
        if crate::bf16::available() {
            return Some(Self::of(weight, outputs, inputs));
        }
        None
    }

    /// The weight as it was rounded, `[outputs, inputs]`.
    ///
    /// # Panics
    /// If these are not the panels of such a weight, or none were made yet.
    #[must_use]
    pub fn unpack(&self, outputs: usize, inputs: usize) -> Vec<f32> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
        let mut weight = zeros(outputs * inputs);
        #[cfg(target_arch = "x86_64")]
        {
            let words = self.forward.get().expect("nothing was packed yet");
            unpack_columns(words.as_slice(), inputs, &mut weight);
        }
        #[cfg(not(target_arch = "x86_64"))]
        assert!(weight.is_empty(), "nothing was packed yet");
        weight
    }
}

#[cfg(target_arch = "x86_64")]
impl FrozenPanels {
    /// Those of `weight`, for `x Wᵀ`; the others follow from them.
    fn of(weight: &[f32], outputs: usize, inputs: usize) -> Self {
        Self {
            forward: packed_rows(weight, outputs, inputs).into(),
            ..Self::default()
        }
    }

    /// The weight's rows as columns of the right operand: `x Wᵀ`.
    pub(crate) fn forward(&self, layer: &FrozenLinear<'_>, inputs: usize) -> &[f32] {
        let make = || packed_rows(layer.values(), layer.outputs, inputs);
        self.forward.get_or_init(make).as_slice()
    }

    /// The weight itself as the right operand: `dy W`.
    pub(crate) fn backward(&self, layer: &FrozenLinear<'_>, inputs: usize) -> &[f32] {
        let panels = self.backward.get_or_init(|| {
            let values = match layer.weight {
                Some(weight) => Cow::Borrowed(weight),
                None => Cow::Owned(self.unpack(layer.outputs, inputs)),
            };
            packed::<COLUMNS>(Source {
                values: &values,
                line_stride: 1,
                k_stride: inputs,
                lines: inputs,
                k: layer.outputs,
            })
        });
        panels.as_slice()
    }
}

#[cfg(target_arch = "x86_64")]
fn packed_rows(weight: &[f32], outputs: usize, inputs: usize) -> LastingFloats {
    packed::<COLUMNS>(Source {
        values: weight,
        line_stride: inputs,
        k_stride: 1,
        lines: outputs,
        k: inputs,
    })
}

#[cfg(target_arch = "x86_64")]
fn packed<const W: usize>(source: Source<'_>) -> LastingFloats {
    let mut words = LastingFloats::zeroed(packed_words::<W>(source.lines, source.k));
    pack::<W>(source, words.as_mut_slice());
    words
}
