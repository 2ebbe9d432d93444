//! Low-rank adapters on a decoder's linear layers.
//!
//! Hu et al. 2021, arXiv:2106.09685, Eq. 3: `y = W x + (alpha / rank) · B A x`, with `W` frozen. `A` starts uniform in
//! ±1/√in (Kaiming with a = √5) and `B` at zero, as in peft, so that the adapted decoder starts as its base.

use std::collections::{BTreeMap, BTreeSet};

use pivotal_core::random_stream;
use rand::RngExt;

use crate::adapter::{AdapterTask, LoraAdapter, LoraModule};
use crate::checkpoint::HostTensor;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::parameter::{on_tape, to_device, to_host};
use crate::projection::{LowRank, Weight};

/// Which layers get an adapter, and how large.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// Rank of the update; at least 1.
    pub rank: usize,
    /// Numerator of the update's scale, `alpha / rank`.
    pub alpha: f64,
    /// Last components of the module paths to adapt: `q_proj`, `down_proj`, …; every linear layer if empty.
    pub targets: Vec<String>,
}

impl LoraSpec {
    /// Whether the layer of this name gets an adapter.
    fn adapts(&self, name: &str) -> bool {
        self.targets.is_empty() || self.targets.iter().any(|target| target == name)
    }

    /// That the decoder has the targets, and one among them with so many rows and columns.
    fn check(&self, decoder: &mut Decoder) -> Result<()> {
        let layers: Vec<(String, usize)> = decoder
            .projections()
            .map(|(path, projection)| {
                let [out, input] = projection.shape();
                (layer_name(&path).to_owned(), out.min(input))
            })
            .collect();
        let names: BTreeSet<&str> = layers.iter().map(|(name, _)| name.as_str()).collect();
        let mut targets = self.targets.iter();
        if let Some(target) = targets.find(|target| !names.contains(target.as_str())) {
            return Err(Error::LoraTarget {
                target: target.clone(),
                layers: names.into_iter().map(str::to_owned).collect(),
            });
        }
        let adapted = layers.iter().filter(|(name, _)| self.adapts(name));
        let most = adapted.map(|&(_, rank)| rank).max().unwrap_or(0);
        match self.rank > most {
            true => Err(Error::LoraRank {
                rank: self.rank,
                most,
            }),
            false => Ok(()),
        }
    }
}

/// The last component of a module's path.
fn layer_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

impl Decoder {
    /// Adds a trainable adapter that changes nothing yet (`B` is zero); the decoder's own weights are frozen.
    ///
    /// # Errors
    /// [`Error::Domain`] if the rank is 0; [`Error::LoraRank`] if it is above that of every layer to adapt;
    /// [`Error::LoraTarget`] if a target is no linear layer of this decoder.
    pub fn with_lora(self, spec: &LoraSpec, seed: u64) -> Result<Self> {
        if spec.rank == 0 {
            return Err(Error::Domain {
                what: "lora rank",
                expected: "at least 1",
                found: 0.0,
            });
        }
        let mut decoder = self.base();
        spec.check(&mut decoder)?;
        let mut stream = random_stream(seed, "lora");
        let device = decoder.device().clone();
        for (path, projection) in decoder.projections() {
            if !spec.adapts(layer_name(&path)) {
                continue;
            }
            let [out, input] = projection.shape();
            let bound = 1.0 / (input as f32).sqrt();
            let a = (0..spec.rank * input)
                .map(|_| stream.random_range(-bound..bound))
                .collect();
            let a = HostTensor::new(vec![spec.rank, input], a)?;
            let b = HostTensor::new(vec![out, spec.rank], vec![0.0; out * spec.rank])?;
            projection.adapter = Some(LowRank {
                a: on_tape(to_device(&a, &device)),
                b: on_tape(to_device(&b, &device)),
                scale: (spec.alpha / spec.rank as f64) as f32,
            });
        }
        Ok(decoder)
    }

    /// Puts a saved adapter on the decoder, trainable; the decoder's own weights are frozen.
    ///
    /// # Errors
    /// If the adapter names a layer that the decoder does not have, or has another shape.
    pub fn with_adapter(self, adapter: &LoraAdapter) -> Result<Self> {
        adapter.check(self.config())?;
        let mut decoder = self.base();
        let device = decoder.device().clone();
        for (path, projection) in decoder.projections() {
            if let Some(LoraModule { a, b }) = adapter.modules.get(&path) {
                projection.adapter = Some(LowRank {
                    a: on_tape(to_device(a, &device)),
                    b: on_tape(to_device(b, &device)),
                    scale: adapter.scale() as f32,
                });
            }
        }
        Ok(decoder)
    }

    /// Whether an adapter is on.
    pub fn has_adapter(&mut self) -> bool {
        self.projections()
            .any(|(_, projection)| projection.adapter.is_some())
    }

    /// The adapter in host memory, for saving in peft's format; absent if there is none.
    pub fn adapter(&mut self, base_model: Option<String>) -> Option<LoraAdapter> {
        let mut modules = BTreeMap::new();
        let mut shape = None;
        for (path, projection) in self.projections() {
            if let Some(LowRank { a, b, scale }) = &projection.adapter {
                let [rank, _] = a.dims();
                shape = Some((rank, f64::from(*scale) * rank as f64));
                modules.insert(
                    path,
                    LoraModule {
                        a: to_host(a.clone()),
                        b: to_host(b.clone()),
                    },
                );
            }
        }
        shape.map(|(rank, alpha)| LoraAdapter {
            rank,
            alpha,
            rank_stabilised: false,
            task: AdapterTask::CausalLm,
            base_model,
            modules,
            value_head: None,
        })
    }

    /// The decoder with its adapter added into the weights, and no adapter.
    #[must_use]
    pub fn merged(&self) -> Self {
        let mut decoder = self.detached();
        for (_, projection) in decoder.projections() {
            projection.weight = Weight::Tensor(projection.merged_weight());
            projection.adapter = None;
        }
        decoder
    }
}
