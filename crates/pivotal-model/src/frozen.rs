//! The linear layers of a decoder whose own weights are not trained, grouped by what they read and packed once.
//!
//! A policy with an adapter, its base and its reference share the weights, and so the packs: they are looked up by the memory
//! of the weights, which the packs keep, and a decoder whose weights change finds them no longer its own.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;
use pivotal_ops::{FrozenInput, FrozenLayer, FrozenLinears, LowRank, Precision};

use crate::projection::Projection;

/// Frozen layers once made; clones of a decoder share the place.
#[derive(Clone, Debug, Default)]
pub(crate) struct FrozenCache(Arc<Mutex<Option<FrozenLinears>>>);

impl FrozenCache {
    /// The packed layers, made now if they are not there; `None` where there is no kernel for them.
    pub(crate) fn get(
        &self,
        input: FrozenInput<'_>,
        layers: &[FrozenLayer<'_>],
    ) -> Option<FrozenLinears> {
        // What is in there is whole or absent, whoever panicked.
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept
            .as_ref()
            .is_some_and(|kept| kept.is_made_of(input, layers))
        {
            *kept = FrozenLinears::new(input, layers);
        }
        kept.clone()
    }

    /// The projections of `input`'s outcome side by side, where a kernel takes them: frozen weights, and updates of one rank
    /// and scale if any.
    pub(crate) fn project(
        &self,
        x: &Tensor<2>,
        input: FrozenInput<'_>,
        projections: &[&Projection],
        precision: Precision,
    ) -> Option<Tensor<2>> {
        let (frozen, updates) = self.group(input, projections)?;
        Some(frozen.forward(x.clone(), &updates, precision))
    }

    /// The packed projections and their updates, where a kernel takes them.
    pub(crate) fn group<'a>(
        &self,
        input: FrozenInput<'_>,
        projections: &[&'a Projection],
    ) -> Option<(FrozenLinears, Vec<Option<LowRank<'a>>>)> {
        let layers: Vec<FrozenLayer<'_>> = projections
            .iter()
            .map(|projection| projection.frozen())
            .collect();
        let updates: Vec<Option<LowRank<'_>>> = projections
            .iter()
            .map(|projection| {
                projection.adapter.as_ref().map(|adapter| LowRank {
                    a: &adapter.a,
                    b: &adapter.b,
                    scale: adapter.scale,
                })
            })
            .collect();
        let frozen = self.get(input, &layers)?;
        frozen.takes(&updates).then_some((frozen, updates))
    }
}
