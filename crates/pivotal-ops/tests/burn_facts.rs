//! What the workspace relies on in Burn 0.22, so that an upgrade that changes it fails here first.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Bytes, DType, Device, Int, Tensor, TensorData};

#[derive(Module, Debug)]
struct Tiny {
    weight: Param<Tensor<2>>,
    gain: Param<Tensor<1>>,
}

impl Tiny {
    fn new(device: &Device) -> Self {
        // Explicit ids: an optimizer's state is keyed by them, and `Param::from_data` draws random ones.
        let weight = TensorData::new(vec![0.1f32, -0.2, 0.3, 0.4, -0.5, 0.6], [2, 3]);
        Self {
            weight: Param::initialized(ParamId::from(1), Tensor::from_data(weight, device)),
            gain: Param::initialized(ParamId::from(2), Tensor::ones([2], device)),
        }
        .set_require_grad(true)
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        x.matmul(self.weight.val().transpose()) * self.gain.val().unsqueeze::<2>()
    }
}

fn input(device: &Device) -> Tensor<2> {
    Tensor::from_data(
        TensorData::new(vec![1.0f32, 2.0, 3.0, -1.0, 0.5, 2.0], [2, 3]),
        device,
    )
}

fn floats<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.clone().try_into_vec_as::<f32>().unwrap()
}

fn adamw() -> ModuleOptimizer {
    let decay = AdamWConfig::new()
        .with_beta_1(0.9)
        .with_beta_2(0.95)
        .with_epsilon(1e-8)
        .with_weight_decay(0.1);
    let no_decay = decay.clone().with_weight_decay(0.0).build();
    decay
        .init()
        .with_group(ParamGroup::from_path("gain"), no_decay, None)
}

fn step(model: Tiny, optimizer: &mut ModuleOptimizer, device: &Device) -> Tiny {
    let loss = model.forward(input(device)).square().sum();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    optimizer.step(0.01, model, grads)
}

#[test]
fn tensors_go_in_and_come_out_as_slices() {
    let device = Device::flex();
    let x = input(&device);
    assert_eq!(x.dims(), [2, 3]);
    assert_eq!(x.dtype(), DType::F32);
    let data = x.clone().into_data();
    assert_eq!(data.as_slice::<f32>().unwrap()[5], 2.0);
    let rows = Tensor::<1, Int>::from_data(TensorData::new(vec![1i64, 1, 0], [3]), &device);
    let picked = x.select(0, rows.clone());
    assert_eq!(floats(&picked)[..3], [-1.0, 0.5, 2.0]);
    assert_eq!(rows.try_into_vec_as::<i64>().unwrap(), [1, 1, 0]);
}

#[test]
fn select_adds_the_gradients_of_a_repeated_row() {
    let device = Device::flex().autodiff();
    let x = input(&device).require_grad();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(vec![1i64, 1, 0], [3]), &device);
    let grads = x.clone().select(0, rows).sum().backward();
    assert_eq!(
        floats(&x.grad(&grads).unwrap()),
        [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    );
}

#[test]
fn a_frozen_parameter_has_no_gradient_and_does_not_move() {
    let device = Device::flex().autodiff();
    let mut model = Tiny::new(&device);
    model.gain = model.gain.set_require_grad(false);
    let before = (floats(&model.weight.val()), floats(&model.gain.val()));
    let loss = model.forward(input(&device)).square().sum();
    let mut grads = loss.backward();
    assert!(model.gain.val().grad(&grads).is_none());
    let grads = GradientsParams::from_module(&mut grads, &model);
    assert_eq!(grads.len(), 1);
    let model = adamw().step(0.01, model, grads);
    assert_ne!(floats(&model.weight.val()), before.0);
    assert_eq!(floats(&model.gain.val()), before.1);
    assert!(!model.gain.val().is_require_grad());
}

#[test]
fn valid_and_detach_leave_no_tape() {
    let device = Device::flex().autodiff();
    let model = Tiny::new(&device);
    let evaluated = model
        .valid()
        .forward(input(&device.clone().without_autodiff()));
    assert!(!evaluated.is_autodiff());
    let mixed = model.valid().forward(input(&device));
    assert!(!mixed.is_tracked());
    let detached = model.forward(input(&device)).detach();
    assert!(detached.is_autodiff() && !detached.is_tracked());
    assert!(model.forward(input(&device)).is_tracked());
}

#[test]
fn without_a_tape_a_frozen_model_on_an_autodiff_device_is_untracked() {
    let device = Device::flex().autodiff();
    let model = Tiny::new(&device).set_require_grad(false);
    assert!(!model.forward(input(&device)).is_tracked());
}

#[test]
fn adamw_resumes_bit_for_bit_from_bytes() {
    let device = Device::flex().autodiff();
    let (mut model, mut optimizer) = (Tiny::new(&device), adamw());
    for _ in 0..3 {
        model = step(model, &mut optimizer, &device);
    }
    let state: Vec<u8> = optimizer.into_bytes().unwrap().to_vec();
    let weights: Vec<u8> = model.clone().into_record().into_bytes().unwrap().to_vec();
    assert_eq!(state, optimizer.into_bytes().unwrap().to_vec());
    for _ in 0..2 {
        model = step(model, &mut optimizer, &device);
    }

    let record = burn::store::ModuleRecord::from_bytes(Bytes::from_bytes_vec(weights)).unwrap();
    let mut resumed = Tiny::new(&device).load_record(record);
    let mut optimizer_resumed = adamw().from_bytes(Bytes::from_bytes_vec(state)).unwrap();
    for _ in 0..2 {
        resumed = step(resumed, &mut optimizer_resumed, &device);
    }
    assert_eq!(floats(&resumed.weight.val()), floats(&model.weight.val()));
    assert_eq!(floats(&resumed.gain.val()), floats(&model.gain.val()));
}

#[test]
fn detail_23_adamw_decays_before_it_steps_as_pytorch_does() {
    let device = Device::flex().autodiff();
    let model = Tiny::new(&device);
    let before = floats(&model.weight.val());
    let x = input(&device);
    let loss = model.forward(x).square().sum();
    let grads = loss.backward();
    let gradient = floats(&model.weight.val().grad(&grads).unwrap());
    let grads = GradientsParams::from_grads(grads, &model);
    let after = floats(&adamw().step(0.01, model, grads).weight.val());
    for ((before, gradient), after) in before.iter().zip(&gradient).zip(after) {
        let expected = before * (1.0 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-8);
        assert!((after - expected).abs() < 1e-6, "{after} {expected}");
    }
}

struct SquaredNorm<'a> {
    grads: &'a GradientsParams,
    sum: f64,
}

impl ModuleVisitor for SquaredNorm<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            // `sum` over more than 4 Mi elements depends on the number of threads; real models sum by rows or on slices.
            self.sum += f64::from(grad.square().sum().into_scalar::<f32>());
        }
    }
}

struct Scale<'a> {
    grads: &'a mut GradientsParams,
    factor: f32,
}

impl ModuleMapper for Scale<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register(param.id, grad.mul_scalar(self.factor));
        }
        param
    }
}

#[test]
fn a_global_norm_is_taken_over_the_gradients_of_all_parameters() {
    let device = Device::flex().autodiff();
    let model = Tiny::new(&device);
    let loss = model.forward(input(&device)).square().sum();
    let mut grads = GradientsParams::from_grads(loss.backward(), &model);
    let mut visitor = SquaredNorm {
        grads: &grads,
        sum: 0.0,
    };
    model.visit(&mut visitor);
    let norm = visitor.sum.sqrt();
    let model = model.map(&mut Scale {
        grads: &mut grads,
        factor: (1.0 / norm) as f32,
    });
    let mut visitor = SquaredNorm {
        grads: &grads,
        sum: 0.0,
    };
    model.visit(&mut visitor);
    assert!((visitor.sum - 1.0).abs() < 1e-6);
}

#[test]
fn two_jobs_in_two_threads_are_as_one_after_the_other() {
    let run = || {
        let device = Device::flex().autodiff();
        let (mut model, mut optimizer) = (Tiny::new(&device), adamw());
        for _ in 0..20 {
            model = step(model, &mut optimizer, &device);
        }
        floats(&model.weight.val())
    };
    let alone = run();
    let threads: Vec<_> = (0..2).map(|_| std::thread::spawn(run)).collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), alone);
    }
}
