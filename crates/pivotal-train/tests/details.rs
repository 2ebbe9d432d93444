//! The implementation details of preference tuning and PPO that a whole recipe has to get right, each under its number
//! (docs/details.md, "Checklist").

// Long because the checklist's details share their models, batches and helpers.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use pivotal_core::{ErrorKind, HasKind, Pack, Sign, TokenMask, TokenizedPair};
use pivotal_credit::{CreditConfig, Ending, critic, increment};
use pivotal_model::{
    Decoder, Finish, HeadInit, LoraAdapter, Parameter, Parameters, RewardModel, Visitor, load,
};
use pivotal_ops::Precision;
use pivotal_train::dpo::{self, DpoItem, DpoSettings};
use pivotal_train::onpolicy::{Cutting, Layout, OracleLogps, Prompt, Rollout};
use pivotal_train::optimizer::{GradientSum, NamedAdamW};
use pivotal_train::ppo::{
    Experience, Measured, PpoSettings, RewardKl, RewardSpread, Scaling, Shaper, UpdateInputs,
    UpdateRule, UpdateSums, value_gradients,
};
use pivotal_train::reference::pair_logps;
use pivotal_train::reward;
use pivotal_train::score::{Group, ResponseValues, token_logps, token_values};
use pivotal_train::settings::{OptimizerSettings, ProgressMode, RewardSettings};
use pivotal_train::{Activations, Schedule};

fn llama() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden/llama")
}

fn base() -> Decoder {
    Decoder::from_checkpoint(&load(&llama()).unwrap(), &Device::flex(), Precision::F32).unwrap()
}

fn pair(id: u64, chosen: &[u32], rejected: &[u32]) -> TokenizedPair {
    TokenizedPair {
        id,
        prompt: vec![1, 40 + id as u32, 9],
        chosen: chosen.to_vec(),
        rejected: rejected.to_vec(),
    }
}

fn pairs() -> Vec<TokenizedPair> {
    vec![
        pair(1, &[10, 11, 12, 2], &[20, 21, 2]),
        pair(2, &[30, 2], &[31, 32, 33, 34, 35]),
        pair(3, &[50, 51, 2], &[52, 2]),
    ]
}

/// Four tokens behind a prompt, the last of which is `last`.
fn values_with(model: &RewardModel, last: u32) -> ResponseValues {
    let response = [10, 11, 12, last];
    let group = Group {
        prompt: &[1, 5, 6],
        responses: vec![&response],
    };
    token_values(model, &[group], 64)
        .unwrap()
        .remove(0)
        .remove(0)
}

#[test]
fn detail_04_levels_include_their_token_and_a_critics_values_do_not() {
    let model = RewardModel::new(base(), HeadInit::Normal, 3).unwrap();
    let (one, other) = (values_with(&model, 13), values_with(&model, 77));
    assert_eq!(one.levels[..3], other.levels[..3]);
    assert_ne!(one.levels[3], other.levels[3], "a level sees its own token");
    assert_eq!(one.prompt_value, other.prompt_value);

    let before = |values: &ResponseValues| critic(values.prompt_value, &values.levels).0;
    assert_eq!(
        before(&one),
        before(&other),
        "a critic's value sees the state before it"
    );
    assert_eq!(before(&one)[0], one.prompt_value);
    assert_eq!(before(&one)[1..], one.levels[..3]);
    let rise = increment(one.prompt_value, &one.levels);
    assert_eq!(rise[0], one.levels[0] - one.prompt_value);

    // A log-probability is of its own token, from the state before it.
    let logps = |last: u32| {
        let response = [10, 11, 12, last];
        let group = Group {
            prompt: &[1, 5, 6],
            responses: vec![&response],
        };
        token_logps(&base(), &[group], 64)
            .unwrap()
            .remove(0)
            .remove(0)
    };
    let (one, other) = (logps(13), logps(77));
    assert_eq!(one[..3], other[..3]);
    assert_ne!(one[3], other[3]);
}

#[test]
fn detail_11_cached_reference_log_probabilities_are_the_fresh_ones() {
    let (reference, pairs) = (base(), pairs());
    let cache = tempfile::tempdir().unwrap();
    let of = |pairs: &[TokenizedPair], hash: &str| {
        pair_logps(&reference, pairs, 16, cache.path(), hash, ProgressMode::Off).unwrap()
    };
    let files = || {
        let entries = std::fs::read_dir(cache.path()).unwrap();
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().path();
        let tensors = |path: &std::path::PathBuf| path.extension().unwrap() == "safetensors";
        entries.map(name).filter(tensors).count()
    };
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();
    let fresh = token_logps(&reference, &groups, 64).unwrap();
    let first = of(&pairs, "weights");
    assert_eq!(of(&pairs, "weights"), first);
    assert_eq!(files(), 1, "the second time it was read");
    for (cached, fresh) in first.iter().zip(&fresh) {
        // One number a token, bit for bit, whatever the micro-batches.
        assert_eq!(&cached[..], &fresh[..]);
    }
    // Other tokens and other weights are other keys; a damaged file is no cache.
    let mut longer = pairs.clone();
    longer[0].chosen.insert(1, 44);
    assert_ne!(of(&longer, "weights")[0][0].len(), first[0][0].len());
    of(&pairs, "other weights");
    assert_eq!(files(), 3);
    // So are a prompt that only begins alike, one other id of a response, and the same ids cut elsewhere.
    let changes: [fn(&mut TokenizedPair); 4] = [
        |pair| pair.prompt[2] = 8,
        |pair| pair.chosen[1] = 45,
        |pair| pair.rejected[1] = 46,
        |pair| {
            let id = pair.chosen.pop().unwrap();
            pair.rejected.insert(0, id);
        },
    ];
    for (index, change) in changes.iter().enumerate() {
        let mut other = pairs.clone();
        change(&mut other[0]);
        let found = of(&other, "weights");
        assert_eq!(files(), 4 + index, "change {index} found another's file");
        let groups: Vec<_> = other.iter().map(Group::of_pair).collect();
        let fresh = token_logps(&reference, &groups, 64).unwrap();
        for (found, fresh) in found.iter().zip(&fresh) {
            assert_eq!(&found[..], &fresh[..], "change {index}");
        }
    }
    for entry in std::fs::read_dir(cache.path()).unwrap() {
        std::fs::write(entry.unwrap().path(), "rust").unwrap();
    }
    assert_eq!(of(&pairs, "weights"), first);
}

#[test]
fn detail_13_how_far_chosen_log_probabilities_have_moved_is_in_the_metrics() {
    let base = base();
    let adapter = LoraAdapter::load(&llama().join("adapter")).unwrap();
    let mut policy = base.clone().with_adapter(&adapter).unwrap();
    let pairs = pairs();
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();
    let (before, after) = (
        token_logps(&base, &groups, 64).unwrap(),
        token_logps(&policy, &groups, 64).unwrap(),
    );
    let keep = |tokens: usize| TokenMask::from((0..tokens).map(|t| t != 1).collect::<Vec<_>>());
    let (mut sum, mut tokens) = (0.0, 0);
    for (before, after) in before.iter().zip(&after) {
        for at in (0..before[0].len()).filter(|&at| at != 1) {
            sum += f64::from(after[0][at] - before[0][at]);
            tokens += 1;
        }
    }
    let items: Vec<DpoItem> = pairs
        .into_iter()
        .zip(before)
        .map(|(pair, reference)| DpoItem {
            keep: [keep(pair.chosen.len()), keep(pair.rejected.len())],
            pair,
            reference_logps: [reference[0].clone(), reference[1].clone()],
            mismatched: None,
        })
        .collect();
    let items: Vec<_> = items.iter().collect();
    let objective = DpoSettings::default().objective().unwrap();
    let settings = OptimizerSettings::default();
    let (_, metrics) = dpo::gradients(&mut policy, &items, objective, &settings, 1).unwrap();
    let (found, expected) = (metrics.chosen_kept_shift.unwrap(), sum / f64::from(tokens));
    assert!(
        (found - expected).abs() < 1e-5,
        "{found}, expected {expected}"
    );
    assert!(expected.abs() > 1e-2);
}

#[test]
fn detail_14_a_value_head_has_std_one_over_the_root_of_hidden_plus_one_or_is_zero() {
    let decoder = base();
    let hidden = decoder.config().hidden_size;
    let mut all = Vec::new();
    for seed in 0..4000 {
        let model = RewardModel::new(decoder.clone(), HeadInit::Normal, seed).unwrap();
        all.extend(
            model
                .head()
                .values()
                .iter()
                .map(|&weight| f64::from(weight)),
        );
    }
    let count = all.len() as f64;
    let mean = all.iter().sum::<f64>() / count;
    let std = (all.iter().map(|w| (w - mean).powi(2)).sum::<f64>() / count).sqrt();
    let expected = 1.0 / ((hidden + 1) as f64).sqrt();
    // 128,000 draws: the mean is off by 1/358 of a standard deviation, the deviation by 1/506 of itself. Without the + 1
    // it would be off by 1/65.
    assert!(mean.abs() < 4.0 * expected / 358.0, "{mean}");
    assert!(
        (std / expected - 1.0).abs() < 4.0 / 506.0,
        "{std}, expected {expected}"
    );
}

#[test]
fn detail_14_reward_training_begins_at_ln_2() {
    let mut model = RewardModel::new(base(), HeadInit::Zero, 1).unwrap();
    let pairs = pairs();
    let batch: Vec<_> = pairs.iter().collect();
    let (rewards, settings) = (RewardSettings::default(), OptimizerSettings::default());
    let (sum, metrics) = reward::gradients(&mut model, &batch, &rewards, &settings, 1).unwrap();
    assert!((metrics.loss - std::f64::consts::LN_2).abs() < 1e-6);
    assert_eq!((metrics.accuracy, metrics.margin), (0.5, 0.0));
    assert!(sum.norm() > 0.0);
}

const TOKENS: [usize; 3] = [4, 1, 3];

/// Three responses of one policy that is its reference, and of a value model that gives 0.
fn measured(scores: [f32; 3], ending: Ending) -> Vec<Measured> {
    let one = |(index, (&tokens, score)): (usize, (&usize, f32))| Measured {
        id: index as u64 + 1,
        sample: 0,
        score,
        penalty: 0.0,
        ending,
        old_logps: vec![-1.0; tokens],
        reference_logps: vec![-1.0; tokens],
        values: ResponseValues {
            prompt_value: 0.0,
            levels: vec![0.0; tokens],
        },
        levels: None,
        texts: Vec::new(),
    };
    let all = TOKENS.iter().zip(scores).enumerate();
    all.map(one).collect()
}

fn shaped(settings: &PpoSettings, batch: &[Measured]) -> Experience {
    let rule = CreditConfig::default().resolve().unwrap();
    let mut shaper = Shaper::new(settings, &rule, false, 1, None).unwrap();
    shaper.shape(batch, 1).unwrap().0
}

#[test]
fn detail_17_each_response_is_paid_at_its_own_last_token() {
    let experience = shaped(
        &PpoSettings::default(),
        &measured([2.0, -1.0, 0.5], Ending::Eos),
    );
    assert_eq!(
        experience.rewards,
        [vec![0.0, 0.0, 0.0, 2.0], vec![-1.0], vec![0.0, 0.0, 0.5]]
    );
    let signs = [Sign::Positive, Sign::Negative, Sign::Neutral];
    assert_eq!(
        experience.signs, signs,
        "of the score less the batch's mean"
    );
}

#[test]
fn detail_17_a_token_pays_for_its_own_divergence_from_the_reference() {
    let settings = PpoSettings {
        kl_coef: 0.1,
        ..PpoSettings::default()
    };
    let mut batch = measured([0.0; 3], Ending::Eos);
    // More probable under the policy than under the reference costs.
    batch[0].reference_logps = vec![-1.0, -3.0, -0.5, -1.0];
    let rewards = &shaped(&settings, &batch).rewards[0];
    assert_eq!(rewards, &[0.0, -0.1 * 2.0, 0.1 * 0.5, 0.0]);
}

#[test]
fn detail_17_no_clamp_takes_the_penalty_of_a_truncated_response_away() {
    let settings = PpoSettings {
        score_clamp: 1.0,
        ..PpoSettings::default()
    };
    let mut batch = measured([5.0, 5.0, -5.0], Ending::Truncated);
    batch[0].ending = Ending::Eos;
    for one in &mut batch[1..] {
        one.penalty = 0.25;
    }
    let rewards = shaped(&settings, &batch).rewards;
    let last: Vec<f32> = rewards.iter().map(|row| *row.last().unwrap()).collect();
    assert_eq!(last, [1.0, 0.75, -1.25]);
}

#[test]
fn detail_17_a_reward_a_segment_or_a_token_pays_the_penalty_too() {
    let rule = |keys: &str| {
        toml::from_str::<CreditConfig>(keys)
            .unwrap()
            .resolve()
            .unwrap()
    };
    let rule = rule("signal = 'level'\ncut = 'fixed'\ncut_tokens = 2");
    let mut batch = measured([0.0; 3], Ending::Truncated);
    for (one, tokens) in batch.iter_mut().zip(TOKENS) {
        one.penalty = 0.25;
        one.levels = Some(ResponseValues {
            prompt_value: 0.0,
            levels: vec![1.0; tokens],
        });
    }
    batch[2].penalty = 0.0;
    for (spread, expected) in [
        (
            RewardSpread::SegmentLast,
            [vec![0.0, 1.0, 0.0, 0.75], vec![0.75], vec![0.0, 1.0, 1.0]],
        ),
        (
            RewardSpread::SegmentEven,
            [vec![0.5, 0.5, 0.5, 0.25], vec![0.75], vec![0.5, 0.5, 1.0]],
        ),
        (
            RewardSpread::Token,
            [vec![1.0, 1.0, 1.0, 0.75], vec![0.75], vec![1.0; 3]],
        ),
    ] {
        let settings = PpoSettings {
            spread,
            ..PpoSettings::default()
        };
        let mut shaper = Shaper::new(&settings, &rule, true, 1, None).unwrap();
        let (experience, _) = shaper.shape(&batch, 1).unwrap();
        assert_eq!(experience.rewards, expected, "{spread:?}");
    }
}

#[test]
fn increments_that_are_paid_add_up_to_the_levels_rise_whatever_moves_the_signal() {
    let mut batch = measured([0.0; 3], Ending::Eos);
    let levels = [
        vec![0.5, -1.0, 2.0, 3.0],
        vec![-0.25],
        vec![1.0, 0.125, 4.0],
    ];
    let mut rises = Vec::new();
    for (one, levels) in batch.iter_mut().zip(levels) {
        rises.push(levels[levels.len() - 1] - 0.75);
        one.levels = Some(ResponseValues {
            prompt_value: 0.75,
            levels,
        });
    }
    let paid = |spread: RewardSpread, moved: &str| -> Vec<f32> {
        let text =
            format!("signal = 'increment'\nscore = 'sum'\ncut = 'fixed'\ncut_tokens = 2\n{moved}");
        let config: CreditConfig = toml::from_str(&text).unwrap();
        let settings = PpoSettings {
            spread,
            ..PpoSettings::default()
        };
        let rule = config.resolve().unwrap();
        let mut shaper = Shaper::new(&settings, &rule, true, 1, None).unwrap();
        let (experience, _) = shaper.shape(&batch, 1).unwrap();
        experience
            .rewards
            .iter()
            .map(|one| one.iter().sum())
            .collect()
    };
    for spread in [
        RewardSpread::Token,
        RewardSpread::SegmentLast,
        RewardSpread::SegmentEven,
    ] {
        for moved in [
            "",
            "signal_delay = 1",
            "signal_delay = 3",
            "baseline = 'position_mean'",
        ] {
            assert_eq!(paid(spread, moved), rises, "{spread:?} {moved}");
        }
    }
}

#[test]
fn the_oracles_ratio_is_of_the_models_whatever_the_temperature_of_sampling() {
    let reference = base();
    let adapter = LoraAdapter::load(&llama().join("adapter")).unwrap();
    let oracle = base().with_adapter(&adapter).unwrap();
    let prompt = Prompt {
        id: 1,
        token_ids: vec![1, 20, 30],
        checks: Vec::new(),
        reference: serde_json::Value::Null,
    };
    let rollouts: Vec<Rollout> = [vec![40, 41, 2], vec![50, 2]]
        .into_iter()
        .enumerate()
        .map(|(sample, token_ids)| Rollout {
            prompt: 0,
            id: 1,
            sample,
            sampled_logps: vec![0.0; token_ids.len()],
            token_ids,
            finish: Finish::Eos,
            text: String::new(),
        })
        .collect();
    let cutting = Cutting {
        minibatches: 1,
        micro_batch_tokens: 64,
        seed: 1,
        stream: "minibatches",
    };
    let layout = Layout::new(&[&prompt], &rollouts, &|_| true, cutting).unwrap();
    let found = OracleLogps::of(Some(&oracle), &reference, &layout, &rollouts).unwrap();
    let responses: Vec<_> = rollouts.iter().map(|one| &one.token_ids[..]).collect();
    let mut pack = Pack::default();
    pack.push(&prompt.token_ids, &responses).unwrap();
    let gathers = pack.gather(|_, _| true);
    for (decoder, found) in [(&oracle, &found.oracle), (&reference, &found.reference)] {
        let hidden = decoder.hidden(&pack).unwrap();
        let whole = decoder.token_logps(&hidden, &gathers).into_data();
        assert_eq!(found.concat(), whole.try_to_vec::<f32>().unwrap());
        assert_ne!(found, &layout.token_logps(decoder, &rollouts, 1.7).unwrap());
    }
    let none = OracleLogps::of(None, &reference, &layout, &rollouts).unwrap();
    assert!(none.oracle.is_empty() && none.reference.is_empty());
}

#[test]
fn detail_19_rewards_are_not_whitened_unless_asked_and_advantages_are() {
    let plain = PpoSettings::default();
    assert!(!plain.whiten_rewards && plain.whiten_advantages);
    let batch = measured([3.0, -1.0, 0.5], Ending::Eos);
    let experience = shaped(&plain, &batch);
    assert_eq!(experience.rewards[0][3], 3.0);
    let all = experience.advantages.concat();
    let mean = all.iter().sum::<f32>() / all.len() as f32;
    let square = all.iter().map(|a| (a - mean).powi(2)).sum::<f32>();
    assert!(mean.abs() < 1e-6 && (square / (all.len() - 1) as f32 - 1.0).abs() < 1e-5);
    // What the value model learns is not whitened: λ-returns of the rewards themselves.
    assert_eq!(*experience.returns[0].last().unwrap(), 3.0);

    let whitened = PpoSettings {
        whiten_rewards: true,
        ..plain
    };
    assert_ne!(shaped(&whitened, &batch).rewards[0][3], 3.0);
}

#[test]
fn detail_20_a_fresh_value_model_gives_0_everywhere() {
    assert_eq!(
        RewardModel::new(base(), HeadInit::default(), 7)
            .unwrap()
            .head()
            .values(),
        vec![0.0; base().config().hidden_size]
    );
    let settings = PpoSettings::default();
    let head = RewardModel::new(base(), settings.head_init.into(), 7).unwrap();
    let values = values_with(&head, 13);
    assert_eq!((values.prompt_value, values.levels), (0.0, vec![0.0; 4]));
}

#[test]
fn detail_04_a_step_of_ppo_takes_the_value_of_the_state_before_each_token() {
    let settings = PpoSettings {
        gae_lambda: 0.0,
        kl_coef: 0.0,
        whiten_advantages: false,
        ..PpoSettings::default()
    };
    let mut batch = measured([2.0, 3.0, 0.0], Ending::Eos);
    batch[0].values = ResponseValues {
        prompt_value: 0.5,
        levels: vec![1.0, 2.0, 4.0, 8.0],
    };
    batch[1].values.prompt_value = -1.0;
    let experience = shaped(&settings, &batch);
    assert_eq!(experience.old_values[0], [0.5, 1.0, 2.0, 4.0]);
    assert_eq!(experience.old_values[1], [-1.0]);
    // The TD errors: the value after, the reward, less the value before. Nothing is worth anything after the end.
    assert_eq!(experience.advantages[0], [0.5, 1.0, 2.0, 2.0 - 4.0]);
    assert_eq!(experience.advantages[1], [3.0 + 1.0]);
}

#[test]
fn detail_04_the_value_model_learns_the_value_of_the_state_before_each_token() {
    let mut model = RewardModel::new(base(), HeadInit::Normal, 3).unwrap();
    let prompts = [[1, 20, 30], [1, 20, 31]].map(|token_ids| Prompt {
        id: u64::from(token_ids[2]),
        token_ids: token_ids.to_vec(),
        checks: Vec::new(),
        reference: serde_json::Value::Null,
    });
    let prompts: Vec<&Prompt> = prompts.iter().collect();
    let rollouts: Vec<Rollout> = [(0, vec![40, 41, 2]), (0, vec![50, 2]), (1, vec![60])]
        .into_iter()
        .map(|(prompt, token_ids)| Rollout {
            prompt,
            id: prompts[prompt].id,
            sample: token_ids.len(),
            sampled_logps: vec![0.0; token_ids.len()],
            token_ids,
            finish: Finish::Eos,
            text: String::new(),
        })
        .collect();
    let cutting = Cutting {
        minibatches: 1,
        micro_batch_tokens: 64,
        seed: 1,
        stream: "minibatches",
    };
    let layout = Layout::new(&prompts, &rollouts, &|_| true, cutting).unwrap();
    let before: Vec<Vec<f32>> = rollouts
        .iter()
        .map(|rollout| {
            let group = Group {
                prompt: &prompts[rollout.prompt].token_ids,
                responses: vec![&rollout.token_ids],
            };
            let values = token_values(&model, &[group], 64)
                .unwrap()
                .remove(0)
                .remove(0);
            critic(values.prompt_value, &values.levels).0
        })
        .collect();
    let ones: Vec<Vec<f32>> = before.iter().map(|row| vec![1.0; row.len()]).collect();
    let keep: Vec<TokenMask> = before.iter().map(|row| TokenMask::all(row.len())).collect();
    let half_squared_error = |returns: &[Vec<f32>], model: &mut RewardModel| {
        let experience = Experience {
            old_values: before.clone(),
            rewards: ones.clone(),
            advantages: ones.clone(),
            returns: returns.to_vec(),
            signs: vec![Sign::Positive; before.len()],
        };
        let inputs = UpdateInputs {
            rollouts: &rollouts,
            old_logps: &ones,
            experience: &experience,
            keep: &keep,
        };
        let rule = UpdateRule {
            settings: &PpoSettings {
                value_clip: 0.0,
                ..PpoSettings::default()
            },
            temperature: 1.0,
            activations: Activations::Keep,
            step: 1,
        };
        let mut sums = UpdateSums::default();
        value_gradients(model, &layout.minibatches[0], inputs, rule, &mut sums).unwrap();
        sums.numbers().value_loss
    };
    // What is to be learnt is what it says already, token by token: there is no error.
    let none = half_squared_error(&before, &mut model);
    assert!(none < 1e-10, "{none}");
    let raised: Vec<Vec<f32>> = before
        .iter()
        .map(|row| row.iter().map(|value| value + 0.5).collect())
        .collect();
    let some = half_squared_error(&raised, &mut model);
    assert!((some - 0.125).abs() < 1e-5, "{some}");
    let all = before.concat();
    let differ = all.windows(2).all(|two| (two[0] - two[1]).abs() > 1e-3);
    assert!(differ, "a neighbour's value would show: {all:?}");
}

#[test]
fn detail_24_clamps_are_counted_in_the_metrics() {
    let rule = CreditConfig::default().resolve().unwrap();
    let settings = PpoSettings {
        score_clamp: 10.0,
        log_ratio_clamp: 20.0,
        kl_clamp: 10.0,
        score_scaling: Scaling::None,
        ..PpoSettings::default()
    };
    let mut batch = measured([50.0, 1.0, -10.0], Ending::Eos);
    batch[0].reference_logps = vec![-31.0, -16.0, -1.0, -1.0];
    let mut shaper = Shaper::new(&settings, &rule, false, 1, None).unwrap();
    let (_, numbers) = shaper.shape(&batch, 1).unwrap();
    assert_eq!(
        (
            numbers.clamped_scores,
            numbers.clamped_log_ratios,
            numbers.clamped_kls
        ),
        (1, 1, 2)
    );
    // What is logged is what was before any clamp.
    assert_eq!(numbers.max_abs_log_ratio, 30.0);
    assert_eq!(numbers.kl, 45.0 / 3.0);
}

#[test]
fn a_reward_that_is_not_finite_names_step_and_row() {
    let rule = CreditConfig::default().resolve().unwrap();
    let settings = PpoSettings {
        kl_estimator: RewardKl::K3,
        ..PpoSettings::default()
    };
    let mut batch = measured([0.0; 3], Ending::Eos);
    // e^199 has no place in an f32.
    batch[2].old_logps[1] = -200.0;
    let mut shaper = Shaper::new(&settings, &rule, false, 1, None).unwrap();
    let error = shaper.shape(&batch, 7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFinite);
    assert_eq!(
        error.to_string(),
        "the run diverged: `rewards` is not finite at step 7 (rows [3])"
    );
}

struct Weight([Tensor<2>; 1]);

impl Parameters for Weight {
    fn visit_parameters(&mut self, visit: &mut Visitor<'_>) {
        visit("weight", Parameter::Matrix(&mut self.0[0]));
    }
}

#[test]
fn detail_23_eps_stands_beside_the_corrected_root_as_in_pytorch() {
    let settings = OptimizerSettings {
        eps: 0.5,
        clip_norm: 0.0,
        weight_decay: 0.0,
        ..OptimizerSettings::default()
    };
    let mut model = Weight([Tensor::<2>::from_floats([[1.0, -2.0]], &Device::flex())
        .autodiff()
        .require_grad()]);
    let mut sum = GradientSum::default();
    let slopes = Tensor::<2>::from_floats([[0.25, -4.0]], &Device::flex());
    let loss = (model.0[0].clone() * slopes).sum();
    sum.add(&mut model, &loss.backward());
    NamedAdamW::new(&settings)
        .step(&mut model, sum, 0.1, 1)
        .unwrap();
    let found: Vec<f32> = model.0[0].clone().try_into_vec_as().unwrap();
    // The first step: m̂ = g, √v̂ = |g|. TensorFlow's ε is that of the uncorrected root: 0.5/√(1 − β₂), 32 times this one.
    let expected = [
        1.0 - 0.1 * 0.25 / (0.25 + 0.5),
        -2.0 + 0.1 * 4.0 / (4.0 + 0.5),
    ];
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found - expected).abs() < 1e-6,
            "{found}, expected {expected}"
        );
    }
}

#[test]
fn detail_23_the_learning_rate_falls_to_0() {
    for schedule in [Schedule::Linear, Schedule::Cosine] {
        let factors: Vec<f64> = (0..=8).map(|step| schedule.factor(step, 8, 0)).collect();
        assert_eq!(
            (factors[0], factors[8].abs() < 1e-15),
            (1.0, true),
            "{schedule:?}"
        );
        assert!(factors.windows(2).all(|two| two[1] < two[0]), "{factors:?}");
    }
}
