//! The one update of a step: its own pass gives the old log-probabilities, the same bits as a pass before it.

use std::path::Path;

use burn::tensor::Device;
use pivotal_core::TokenMask;
use pivotal_model::{Decoder, Finish, LoraAdapter, load};
use pivotal_ops::Precision;
use pivotal_train::grpo::{GrpoBatch, GrpoObjective, GrpoSettings, UpdateSums, gradients};
use pivotal_train::onpolicy::{Cutting, Layout, Prompt, Rollout};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::settings::{self, OptimizerSettings};
use pivotal_train::workspace::Workspace;

fn decoders(precision: Precision) -> [Decoder; 2] {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden/llama");
    let device = Device::flex();
    let base = Decoder::from_checkpoint(&load(&path).unwrap(), &device, precision).unwrap();
    let adapter = LoraAdapter::load(&path.join("adapter")).unwrap();
    [base.clone().with_adapter(&adapter).unwrap(), base]
}

fn ids(start: u32, count: usize) -> Vec<u32> {
    let id = |place: u32| 3 + (start * 31 + place * 17 + place * place) % 60;
    (0..count as u32).map(id).collect()
}

fn prompts() -> Vec<Prompt> {
    let prompt = |id: u32| Prompt {
        id: u64::from(id) + 1,
        token_ids: ids(id, 3 + id as usize),
        checks: vec![],
        reference: serde_json::Value::Null,
    };
    (0..3).map(prompt).collect()
}

fn rollouts(prompts: &[Prompt]) -> Vec<Rollout> {
    let of = |(prompt, row): (usize, &Prompt)| {
        let id = row.id;
        [4, 1, 9]
            .into_iter()
            .enumerate()
            .map(move |(sample, tokens)| Rollout {
                prompt,
                id,
                sample,
                token_ids: ids((10 * prompt + sample) as u32, tokens),
                sampled_logps: vec![-1.0; tokens],
                finish: Finish::Length,
                text: String::new(),
            })
    };
    prompts.iter().enumerate().flat_map(of).collect()
}

/// The policy's hash after the update, its sums, and the log-probabilities that its pass read.
fn updated(
    precision: Precision,
    kl_coef: f64,
    with_old: bool,
) -> (String, UpdateSums, Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let [mut policy, reference] = decoders(precision);
    let prompts = prompts();
    let prompts: Vec<&Prompt> = prompts.iter().collect();
    let owned: Vec<Prompt> = prompts.iter().map(|&prompt| prompt.clone()).collect();
    let rollouts = rollouts(&owned);
    // The second prompt's group is flat.
    let advantages = [1.2, -0.5, -0.7, 0.0, 0.0, 0.0, -1.0, 0.1, 0.9];
    let live = |index: usize| kl_coef > 0.0 || advantages[index] != 0.0;
    let cutting = Cutting {
        minibatches: 1,
        micro_batch_tokens: 24,
        seed: 1,
        stream: "minibatches 1 0",
    };
    let layout = Layout::new(&prompts, &rollouts, &live, cutting).unwrap();
    assert!(layout.minibatches[0].micro_batches.len() > 1);
    let old = layout.token_logps(&policy, &rollouts, 0.8).unwrap();
    let reference_logps = layout.token_logps(&reference, &rollouts, 0.8).unwrap();
    let keep: Vec<TokenMask> = rollouts
        .iter()
        .map(|rollout| TokenMask::all(rollout.token_ids.len()))
        .collect();
    let settings = GrpoSettings {
        kl_coef,
        ..GrpoSettings::default()
    };
    let batch = GrpoBatch {
        rollouts: &rollouts,
        advantages: &advantages,
        keep: &keep,
        old_logps: if with_old { &old } else { &[] },
        reference_logps: &reference_logps,
    };
    let objective = GrpoObjective {
        settings: &settings,
        temperature: 0.8,
        max_response_tokens: 9,
    };
    let optimizer = OptimizerSettings::default();
    let minibatch = &layout.minibatches[0];
    let found = gradients(&mut policy, minibatch, batch, objective, &optimizer, 1).unwrap();
    let mut adam = NamedAdamW::new(&optimizer);
    adam.step(&mut policy, found.gradients, 0.01, 1).unwrap();
    let hash = Workspace::decoder_hash(&policy, settings::Precision::F32);
    (hash, found.sums, found.token_logps, old)
}

#[test]
fn a_ratio_that_overflows_is_a_number_in_the_metrics() {
    let [mut policy, _] = decoders(Precision::F32);
    let owned = prompts();
    let prompts: Vec<&Prompt> = owned.iter().collect();
    let rollouts = rollouts(&owned);
    let cutting = Cutting {
        minibatches: 1,
        micro_batch_tokens: 1024,
        seed: 1,
        stream: "minibatches 1 0",
    };
    let layout = Layout::new(&prompts, &rollouts, &|_| true, cutting).unwrap();
    let each = |value: f32| -> Vec<Vec<f32>> {
        let tokens = rollouts.iter().map(|rollout| rollout.token_ids.len());
        tokens.map(|tokens| vec![value; tokens]).collect()
    };
    let keep: Vec<TokenMask> = rollouts
        .iter()
        .map(|rollout| TokenMask::all(rollout.token_ids.len()))
        .collect();
    let (old_logps, reference_logps) = (each(-300.0), each(-1.0));
    let batch = GrpoBatch {
        rollouts: &rollouts,
        advantages: &[1.0; 9],
        keep: &keep,
        old_logps: &old_logps,
        reference_logps: &reference_logps,
    };
    let settings = GrpoSettings::default();
    let objective = GrpoObjective {
        settings: &settings,
        temperature: 1.0,
        max_response_tokens: 9,
    };
    let optimizer = OptimizerSettings::default();
    let minibatch = &layout.minibatches[0];
    let sums = gradients(&mut policy, minibatch, batch, objective, &optimizer, 1)
        .unwrap()
        .sums;
    // e^200 and more: every token is clipped above, so that the loss is finite all the same.
    assert_eq!((sums.clipped_high, sums.tokens), (42, 42));
    assert!(sums.loss.is_finite());
    assert_eq!(sums.ratio_deviation, f64::from(f32::MAX));
    assert_eq!(sums.kl_from_old, 42.0 * f64::from(f32::MAX));
    let json = serde_json::json!([sums.ratio_deviation, sums.kl_from_old]).to_string();
    assert!(!json.contains("null"), "{json}");
}

#[test]
fn the_only_update_reads_its_old_log_probabilities_off_its_own_pass() {
    for precision in [Precision::F32, Precision::Bf16] {
        for kl_coef in [0.0, 0.1] {
            let (given, given_sums, given_logps, old) = updated(precision, kl_coef, true);
            let (own, own_sums, own_logps, _) = updated(precision, kl_coef, false);
            assert_eq!(given, own, "{kl_coef}");
            assert_eq!(given_sums, own_sums, "{kl_coef}");
            assert_eq!(own_sums.ratio_deviation, 0.0);
            assert_eq!(
                own_logps, old,
                "{kl_coef}: the very numbers of a pass before"
            );
            assert_eq!(own_logps, given_logps);
        }
    }
}
