//! A decoder with a value head: one number a token.
//!
//! The value of token t is read from the hidden state at t, so it includes token t (METHOD, section 2); a critic's
//! value of the state before t is the one of token t − 1.

use burn::tensor::{Device, Tensor};
use pivotal_core::{Pack, random_stream};
use rand::RngExt;

use crate::checkpoint::{Checkpoint, HostTensor, VALUE_HEAD};
use crate::decoder::Decoder;
use crate::error::Result;
use crate::parameter::{Parameter, Parameters, Visitor, off_tape, on_tape, to_device, to_host};

/// How a value head that the checkpoint lacks begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadInit {
    /// At zero: every value is 0 before training, and no offset by position is drawn at random.
    #[default]
    Zero,
    /// Normal with standard deviation 1/√(hidden + 1) (Huang et al. 2024, "The N implementation details of RLHF with PPO").
    Normal,
}

/// A decoder and a linear head without bias that gives each token a value.
#[derive(Clone, Debug)]
pub struct RewardModel {
    /// The decoder below the head.
    pub decoder: Decoder,
    /// `[1, hidden]`.
    head: Tensor<2>,
}

impl RewardModel {
    /// A reward model on `decoder`, with a fresh trainable head.
    ///
    /// # Errors
    /// Never for the sizes that a configuration allows.
    pub fn new(decoder: Decoder, init: HeadInit, seed: u64) -> Result<Self> {
        let width = decoder.config().hidden_size;
        let values = match init {
            HeadInit::Zero => vec![0.0; width],
            HeadInit::Normal => {
                let std = 1.0 / ((width + 1) as f64).sqrt();
                let mut stream = random_stream(seed, "value head");
                (0..width)
                    .map(|_| (normal(&mut stream) * std) as f32)
                    .collect()
            }
        };
        Self::with_head(decoder, &HostTensor::new(vec![1, width], values)?)
    }

    /// A reward model on `decoder` with the head that `checkpoint` carries, or a zero one if it carries none.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the head has another width than the decoder.
    pub fn with_head(decoder: Decoder, head: &HostTensor) -> Result<Self> {
        let device: Device = decoder.device().clone();
        let width = decoder.config().hidden_size;
        if head.shape() != [1, width] {
            return Err(crate::Error::Shape {
                what: VALUE_HEAD.into(),
                expected: vec![1, width],
                found: head.shape().into(),
            });
        }
        Ok(Self {
            decoder,
            head: on_tape(to_device(head, &device)),
        })
    }

    /// The value of every token of the pack, or of those that it says are [read](Pack::read).
    ///
    /// # Shapes
    /// Returns `[tokens]`, or `[read]`.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn values(&self, pack: &Pack) -> Result<Tensor<1>> {
        Ok(self.values_of(self.decoder.hidden(pack)?))
    }

    /// The values that the head reads from hidden states.
    ///
    /// # Shapes
    /// `hidden` `[rows, hidden]`, what [`Decoder::hidden`] gives; returns `[rows]`.
    pub fn values_of(&self, hidden: Tensor<2>) -> Tensor<1> {
        let [rows, _] = hidden.dims();
        hidden.matmul(self.head.clone().transpose()).reshape([rows])
    }

    /// The same model off the tape, for scoring.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self {
            decoder: self.decoder.detached(),
            head: off_tape(self.head.clone()),
        }
    }

    /// The head in host memory, `[1, hidden]`.
    pub fn head(&self) -> HostTensor {
        to_host(self.head.clone())
    }

    /// Puts the model's weights in `checkpoint`, the head as `score.weight`, an adapter merged.
    pub fn store(&self, checkpoint: &mut Checkpoint) {
        self.decoder.store(checkpoint);
        checkpoint.tensors.insert(VALUE_HEAD.into(), self.head());
    }
}

impl Parameters for RewardModel {
    fn visit_parameters(&mut self, visit: &mut Visitor<'_>) {
        self.decoder.visit_parameters(visit);
        visit(VALUE_HEAD, Parameter::Matrix(&mut self.head));
    }
}

impl AsMut<Decoder> for RewardModel {
    fn as_mut(&mut self) -> &mut Decoder {
        &mut self.decoder
    }
}

/// A standard normal number by Box and Muller's transform.
fn normal(stream: &mut impl rand::Rng) -> f64 {
    let (u, v): (f64, f64) = (1.0 - stream.random::<f64>(), stream.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}
