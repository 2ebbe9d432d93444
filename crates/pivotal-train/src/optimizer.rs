//! AdamW over named parameters, with global gradient clipping and a state that survives a checkpoint bit for bit.
//!
//! The update of each tensor is Burn's [`AdamW`] (Loshchilov & Hutter 2019, arXiv:1711.05101; ε outside the bias
//! correction, as in PyTorch). What is ours is the walk over names, so that a checkpoint can say what belongs to what.

use std::collections::BTreeMap;

use burn::optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, Optimizer};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use pivotal_model::{Decoder, ForwardPass, HostTensor, Parameter, Parameters};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::settings::OptimizerSettings;

/// AdamW and its moments.
pub struct NamedAdamW {
    rule: AdamW,
    clip_norm: f64,
    matrices: BTreeMap<String, AdamWState<2>>,
    vectors: BTreeMap<String, AdamWState<1>>,
}

/// Gradients by parameter name, summed over the micro-batches of one optimizer step.
#[derive(Default)]
pub struct GradientSum {
    matrices: BTreeMap<String, Tensor<2>>,
    vectors: BTreeMap<String, Tensor<1>>,
}

impl GradientSum {
    /// Adds the gradients of one backward pass. A parameter that the loss did not reach adds nothing.
    pub fn add(&mut self, model: &mut dyn Parameters, gradients: &Gradients) {
        model.visit_parameters(&mut |name, parameter| match parameter {
            Parameter::Matrix(tensor) => {
                if let Some(gradient) = tensor.grad(gradients) {
                    accumulate(&mut self.matrices, name, gradient);
                }
            }
            Parameter::Vector(tensor) => {
                if let Some(gradient) = tensor.grad(gradients) {
                    accumulate(&mut self.vectors, name, gradient);
                }
            }
            Parameter::Packed(_) => {}
        });
    }

    /// Differentiates `loss`, which `model` made of the hidden states of `pass`, and adds its gradients.
    ///
    /// # Panics
    /// If no parameter has a part in the loss.
    pub fn add_pass<M: Parameters + AsMut<Decoder>>(
        &mut self,
        model: &mut M,
        pass: ForwardPass,
        loss: Tensor<1>,
    ) {
        pass.backward(model, loss, &mut |part, gradients| {
            self.add(part, gradients)
        });
    }

    /// The same gradients, of a model that is the part `prefix` of a larger one: `prefix.name` for each `name`.
    #[must_use]
    pub fn under(self, prefix: &str) -> Self {
        let name = |name: String| format!("{prefix}.{name}");
        let matrices = self.matrices.into_iter();
        let vectors = self.vectors.into_iter();
        Self {
            matrices: matrices.map(|(key, sum)| (name(key), sum)).collect(),
            vectors: vectors.map(|(key, sum)| (name(key), sum)).collect(),
        }
    }

    /// The gradients by parameter name, in host memory.
    pub fn to_host(&self) -> BTreeMap<String, HostTensor> {
        let matrices = self.matrices.iter();
        let vectors = self.vectors.iter();
        matrices
            .map(|(name, gradient)| (name.clone(), host(gradient.clone())))
            .chain(vectors.map(|(name, gradient)| (name.clone(), host(gradient.clone()))))
            .collect()
    }

    /// The Euclidean norm over all gradients, in f64, and in the order of the names.
    pub fn norm(&self) -> f64 {
        let sums = [square_sums(&self.matrices), square_sums(&self.vectors)];
        // A sum of nothing is −0.
        (0.0 + sums.iter().flatten().sum::<f64>()).sqrt()
    }
}

fn accumulate<const D: usize>(
    sums: &mut BTreeMap<String, Tensor<D>>,
    name: &str,
    gradient: Tensor<D>,
) {
    let sum = match sums.remove(name) {
        Some(sum) => sum + gradient,
        None => gradient,
    };
    sums.insert(name.to_owned(), sum);
}

/// Sums of squares, one a tensor.
fn square_sums<const D: usize>(tensors: &BTreeMap<String, Tensor<D>>) -> Vec<f64> {
    let tensors: Vec<_> = tensors.values().cloned().collect();
    let device = tensors.first().map(Tensor::device);
    each(tensors, device, square_sum)
}

fn square_sum<const D: usize>(tensor: Tensor<D>) -> f64 {
    let data = tensor.into_data();
    let values = data.as_slice::<f32>().expect("gradients are f32");
    values
        .iter()
        .map(|&value| f64::from(value) * f64::from(value))
        .sum()
}

impl NamedAdamW {
    /// An optimizer without moments yet.
    pub fn new(settings: &OptimizerSettings) -> Self {
        let rule = AdamWConfig::new()
            .with_beta_1(settings.beta1 as f32)
            .with_beta_2(settings.beta2 as f32)
            .with_epsilon(settings.eps as f32)
            .with_weight_decay(settings.weight_decay as f32)
            .build();
        Self {
            rule,
            clip_norm: settings.clip_norm,
            matrices: BTreeMap::new(),
            vectors: BTreeMap::new(),
        }
    }

    /// One step. Returns the gradient's norm before clipping.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the norm is not finite; nothing is updated then. [`Error::WeightsNotFinite`] naming the first
    /// parameter that the update made infinite or not a number; the model is of no use then.
    pub fn step(
        &mut self,
        model: &mut impl Parameters,
        mut gradients: GradientSum,
        lr: f64,
        step: u64,
    ) -> Result<f64> {
        let norm = gradients.norm();
        if !norm.is_finite() {
            return Err(Error::NotFinite {
                step,
                metric: "grad_norm",
                samples: Vec::new(),
            });
        }
        let shrink = match self.clip_norm > 0.0 && norm > self.clip_norm {
            true => Some(self.clip_norm / norm),
            false => None,
        };
        let (mut matrices, mut vectors) = (Vec::new(), Vec::new());
        model.visit_parameters(&mut |name, parameter| match parameter {
            Parameter::Matrix(tensor) => {
                let gradient = gradients.matrices.remove(name);
                matrices.extend(gradient.map(|gradient| {
                    Update::take(name, tensor, gradient, self.matrices.remove(name))
                }));
            }
            Parameter::Vector(tensor) => {
                let gradient = gradients.vectors.remove(name);
                vectors.extend(gradient.map(|gradient| {
                    Update::take(name, tensor, gradient, self.vectors.remove(name))
                }));
            }
            Parameter::Packed(_) => {}
        });
        let mut matrices = updated(matrices, &self.rule, shrink, lr);
        let mut vectors = updated(vectors, &self.rule, shrink, lr);
        let broken = [first_broken(&matrices), first_broken(&vectors)];
        model.visit_parameters(&mut |name, parameter| match parameter {
            Parameter::Matrix(tensor) => {
                if let Some(moved) = matrices.remove(name) {
                    *tensor = moved.value;
                    self.matrices.insert(name.to_owned(), moved.state);
                }
            }
            Parameter::Vector(tensor) => {
                if let Some(moved) = vectors.remove(name) {
                    *tensor = moved.value;
                    self.vectors.insert(name.to_owned(), moved.state);
                }
            }
            Parameter::Packed(_) => {}
        });
        match broken.into_iter().flatten().min() {
            None => Ok(norm),
            Some(tensor) => Err(Error::WeightsNotFinite { step, tensor }),
        }
    }

    /// The moments and step counts, for a checkpoint: `<name>.moment_1`, `<name>.moment_2`, `<name>.time`.
    pub fn state(&self) -> BTreeMap<String, HostTensor> {
        let mut state = BTreeMap::new();
        for (name, moments) in &self.matrices {
            export(&mut state, name, &moments.momentum);
        }
        for (name, moments) in &self.vectors {
            export(&mut state, name, &moments.momentum);
        }
        state
    }

    /// Takes back what [`NamedAdamW::state`] gave, for the trainable parameters of `model`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a moment or a step count is missing, or a moment has not its parameter's shape; nothing is
    /// taken then.
    pub fn restore(
        &mut self,
        model: &mut dyn Parameters,
        state: &BTreeMap<String, HostTensor>,
    ) -> Result<()> {
        let mut shapes = BTreeMap::new();
        model.visit_parameters(&mut |name, parameter| {
            if parameter.is_trainable() {
                shapes.insert(name.to_owned(), parameter.shape());
            }
        });
        let (mut matrices, mut vectors) = (BTreeMap::new(), BTreeMap::new());
        for (key, moment_1) in state {
            let Some(name) = key.strip_suffix(".moment_1") else {
                continue;
            };
            let missing = |what: &str| Error::Checkpoint {
                what: format!("`{name}.{what}`"),
            };
            let moment_2 = state
                .get(&format!("{name}.moment_2"))
                .ok_or_else(|| missing("moment_2"))?;
            let time = state
                .get(&format!("{name}.time"))
                .ok_or_else(|| missing("time"))?;
            // A step count fits f32 exactly up to 2^24 steps.
            let time = time
                .values()
                .first()
                .copied()
                .ok_or_else(|| missing("time"))? as usize;
            let shape = shapes.get(name).map(Vec::as_slice).unwrap_or_default();
            for (what, moment) in [("moment_1", moment_1), ("moment_2", moment_2)] {
                if moment.shape() != shape {
                    return Err(Error::Checkpoint {
                        what: format!(
                            "`{name}.{what}` of shape {shape:?}: it has one of {:?}",
                            moment.shape()
                        ),
                    });
                }
            }
            let name = name.to_owned();
            match shape.len() {
                2 => {
                    matrices.insert(name, import(time, moment_1, moment_2));
                }
                _ => {
                    vectors.insert(name, import(time, moment_1, moment_2));
                }
            }
        }
        (self.matrices, self.vectors) = (matrices, vectors);
        Ok(())
    }
}

/// What becomes of one parameter in a step.
struct Update<const D: usize> {
    name: String,
    value: Tensor<D>,
    gradient: Tensor<D>,
    state: Option<AdamWState<D>>,
}

impl<const D: usize> Update<D> {
    /// Takes the parameter out of its model, so that no step holds old and new values of all of them.
    fn take(
        name: &str,
        tensor: &mut Tensor<D>,
        gradient: Tensor<D>,
        state: Option<AdamWState<D>>,
    ) -> Self {
        let nothing = Tensor::empty([1; D], &tensor.device());
        Self {
            name: name.to_owned(),
            value: std::mem::replace(tensor, nothing).without_autodiff(),
            gradient,
            state,
        }
    }

    /// The parameter's name, its next value and its moments.
    fn run(self, rule: &AdamW, shrink: Option<f64>, lr: f64) -> (String, Moved<D>) {
        let gradient = match shrink {
            Some(factor) => self.gradient.mul_scalar(factor),
            None => self.gradient,
        };
        let device = self.value.device();
        // Moments out of a checkpoint are in host memory until their first step.
        let state = self.state.map(|state| {
            let there = state.momentum.moment_1.device() == device;
            if there {
                state
            } else {
                AdamW::to_device(state, &device)
            }
        });
        let (value, state) = rule.step(lr, self.value, gradient, state);
        let state = state.expect("AdamW has moments");
        let (value, finite) = checked(value);
        let value = value.autodiff().require_grad();
        let moved = Moved {
            value,
            state,
            finite,
        };
        (self.name, moved)
    }
}

/// A parameter after a step.
struct Moved<const D: usize> {
    value: Tensor<D>,
    state: AdamWState<D>,
    /// Whether every element of the value is: the loss of the next step would say so, and a last step has none.
    finite: bool,
}

/// The same value, and whether every element of it is finite.
fn checked<const D: usize>(value: Tensor<D>) -> (Tensor<D>, bool) {
    let device = value.device();
    if device != Device::flex() {
        let all = value.clone().is_finite().all().into_data();
        return (value, all.iter::<bool>().all(|finite| finite));
    }
    // Out of its tensor and back into one: nothing is copied, as it would be out of a clone.
    let data = value.into_data();
    let values = data.as_slice::<f32>().expect("parameters are f32");
    // A chunk is looked at as a whole, in lanes.
    let finite = values.chunks(1024).all(|chunk| {
        chunk
            .iter()
            .fold(true, |finite, value| finite & value.is_finite())
    });
    (Tensor::from_data(data, &device), finite)
}

/// The first name, in their order, whose value is not finite.
fn first_broken<const D: usize>(moved: &BTreeMap<String, Moved<D>>) -> Option<String> {
    let mut broken = moved.iter().filter(|(_, moved)| !moved.finite);
    broken.next().map(|(name, _)| name.clone())
}

/// All updates by name.
fn updated<const D: usize>(
    updates: Vec<Update<D>>,
    rule: &AdamW,
    shrink: Option<f64>,
    lr: f64,
) -> BTreeMap<String, Moved<D>> {
    let device = updates.first().map(|update| update.value.device());
    let run = |update: Update<D>| update.run(rule, shrink, lr);
    each(updates, device, run).into_iter().collect()
}

/// What `body` makes of tensors of `device`, in their order: several at once on the processor, where one is too small a piece for
/// all threads.
fn each<T: Send, U: Send>(
    items: Vec<T>,
    device: Option<Device>,
    body: impl Fn(T) -> U + Send + Sync,
) -> Vec<U> {
    match device == Some(Device::flex()) {
        true => items.into_par_iter().map(body).collect(),
        false => items.into_iter().map(body).collect(),
    }
}

fn export<const D: usize>(
    state: &mut BTreeMap<String, HostTensor>,
    name: &str,
    moments: &AdaptiveMomentumState<D>,
) {
    let time = HostTensor::new(vec![1], vec![moments.time as f32]).expect("one value of shape 1");
    state.insert(format!("{name}.time"), time);
    state.insert(format!("{name}.moment_1"), host(moments.moment_1.clone()));
    state.insert(format!("{name}.moment_2"), host(moments.moment_2.clone()));
}

fn host<const D: usize>(tensor: Tensor<D>) -> HostTensor {
    let shape = tensor.dims().to_vec();
    let data = tensor
        .into_data()
        .try_to_vec::<f32>()
        .expect("gradients and moments are f32");
    HostTensor::new(shape, data).expect("a tensor has as many values as its shape says")
}

fn import<const D: usize>(
    time: usize,
    moment_1: &HostTensor,
    moment_2: &HostTensor,
) -> AdamWState<D> {
    let tensor = |value: &HostTensor| {
        let data = TensorData::new(value.values().to_vec(), value.shape().to_vec());
        Tensor::from_data(data, &Device::flex())
    };
    AdamWState::new(AdaptiveMomentumState::new(
        time,
        tensor(moment_1),
        tensor(moment_2),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Model([Tensor<2>; 1]);

    impl Parameters for Model {
        fn visit_parameters(&mut self, visit: &mut pivotal_model::Visitor<'_>) {
            visit("weight", Parameter::Matrix(&mut self.0[0]));
        }
    }

    fn model(shape: [usize; 2]) -> Model {
        let tensor = Tensor::ones(shape, &Device::flex());
        Model([tensor.autodiff().require_grad()])
    }

    #[test]
    fn weights_that_a_step_breaks_are_named() {
        let mut trained = model([2, 3]);
        let mut sum = GradientSum::default();
        let loss = trained.0[0].clone().square().sum();
        sum.add(&mut trained, &loss.backward());
        let settings = OptimizerSettings {
            weight_decay: 1e30,
            ..OptimizerSettings::default()
        };
        let mut optimizer = NamedAdamW::new(&settings);
        let error = optimizer.step(&mut trained, sum, 1e30, 7).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("`weight` not finite at step 7"), "{said}");
        assert_eq!(pivotal_core::HasKind::kind(&error).exit_code(), 3);
    }

    #[test]
    fn moments_of_another_shape_or_of_no_parameter_are_refused() {
        let mut trained = model([2, 3]);
        let mut sum = GradientSum::default();
        let loss = trained.0[0].clone().square().sum();
        sum.add(&mut trained, &loss.backward());
        let mut optimizer = NamedAdamW::new(&OptimizerSettings::default());
        optimizer.step(&mut trained, sum, 0.1, 1).unwrap();
        let state = optimizer.state();

        let mut again = NamedAdamW::new(&OptimizerSettings::default());
        again.restore(&mut trained, &state).unwrap();
        assert_eq!(again.state(), state);
        let error = again.restore(&mut model([3, 2]), &state).unwrap_err();
        assert!(error.to_string().contains("[3, 2]"), "{error}");
        // As many values, in another shape.
        let mut flat = state.clone();
        let moment = HostTensor::new(vec![6], vec![0.0; 6]).unwrap();
        flat.insert("weight.moment_2".into(), moment);
        let error = again.restore(&mut trained, &flat).unwrap_err();
        assert!(error.to_string().contains("weight.moment_2"), "{error}");
        let mut strange = state.clone();
        for part in ["moment_1", "moment_2", "time"] {
            let tensor = state[&format!("weight.{part}")].clone();
            strange.insert(format!("other.{part}"), tensor);
        }
        let error = again.restore(&mut trained, &strange).unwrap_err();
        assert!(error.to_string().contains("other"), "{error}");
        assert_eq!(again.state(), state);
    }
}
