//! Decoding with a cache against the packed forward pass and against transformers.
#![expect(
    clippy::print_stdout,
    reason = "bf16 differences are measured, not only bounded"
)]

#[path = "../reference/mod.rs"]
mod reference;
mod rollouts;

use std::sync::Arc;

use pivotal_core::{ErrorKind, HasKind};
use pivotal_kernels::argmax;
use pivotal_model::{
    Decoder, Finish, GenerateSettings, Generation, Generator, LoraAdapter, Sampling, Sequence, load,
};
use pivotal_ops::Precision;
use reference::{decoder, difference, floats, golden, ids, json, numbers, sequence, widened};

/// Logits and token log-probabilities of the tiny models, absolute (scripts/golden/README.md).
const LOGITS: f64 = 1e-4;

const MODELS: [&str; 5] = ["llama", "llama_bf16", "llama3", "qwen2", "mistral"];

/// Both sides round the operands of every linear layer and of attention to bf16, the weights of its mixtures before or after they are
/// divided by their sum.
const BF16_LOGITS: f64 = 0.25;

/// The logits of every token from the last of `prompt` on, one step a token.
fn cached_logits(generator: &Generator, prompt: &[u32], rest: &[u32]) -> Vec<f32> {
    let cache = generator.prefill(&[prompt]).unwrap().remove(0);
    let mut logits = cache.logits().to_vec();
    let mut sequences = [Sequence::new(Arc::new(cache))];
    for &token in rest {
        logits.extend(generator.step(&mut sequences, &[token]).unwrap());
    }
    assert_eq!(sequences[0].len(), prompt.len() + rest.len());
    logits
}

fn full_logits(decoder: &Decoder, token_ids: &[u32], from: usize) -> Vec<f64> {
    let hidden = decoder.hidden(&sequence(token_ids)).unwrap();
    let sources: Vec<usize> = (from..token_ids.len()).collect();
    widened(&floats(decoder.logits(&hidden, &sources)))
}

fn settings(sampling: Sampling) -> GenerateSettings {
    GenerateSettings {
        sampling,
        samples: 3,
        max_tokens: 12,
        eos: Vec::new(),
        batch: 4,
        seed: 5,
    }
}

#[test]
fn detail_34_cached_logits_are_those_of_the_whole_forward_pass_and_of_transformers() {
    for model in MODELS {
        let decoder = decoder(&golden(model), Precision::F32);
        let generator = Generator::new(&decoder, Precision::F32);
        let golden_json = json(&format!("{model}/golden.json"));
        for expected in golden_json["sequences"].as_array().unwrap() {
            let token_ids = ids(&expected["token_ids"]);
            for prompt in [1, token_ids.len() / 2, token_ids.len()] {
                let (head, rest) = token_ids.split_at(prompt.max(1));
                let found = cached_logits(&generator, head, rest);
                let off = difference(&found, full_logits(&decoder, &token_ids, head.len() - 1));
                assert!(
                    off <= LOGITS,
                    "{model}: {prompt} prompt tokens, off by {off:e}"
                );
                if let Some(logits) = expected.get("logits") {
                    let vocab = decoder.config().vocab_size;
                    let off =
                        difference(&found, numbers(logits).split_off((head.len() - 1) * vocab));
                    assert!(off <= LOGITS, "{model}: off from transformers by {off:e}");
                }
            }
        }
    }
}

#[test]
fn sequences_and_prompts_do_not_feel_their_neighbours() {
    for (model, precision) in [("llama3", Precision::F32), ("mistral", Precision::Bf16)] {
        let generator = Generator::new(&decoder(&golden(model), Precision::F32), precision);
        let long: Vec<u32> = (0..90).map(|i| 4 + i % 70).collect();
        let prompts: [&[u32]; 3] = [&[1, 9, 30], &long, &[5]];
        let caches: Vec<_> = generator
            .prefill(&prompts)
            .unwrap()
            .into_iter()
            .map(Arc::new)
            .collect();
        let mut together: Vec<_> = [0, 1, 1, 2]
            .map(|prompt| Sequence::new(Arc::clone(&caches[prompt])))
            .into();
        let steps = [[7, 8, 9, 10], [20, 21, 20, 23], [5, 5, 6, 5]];
        let mut last = Vec::new();
        for tokens in &steps {
            last = generator.step(&mut together, tokens).unwrap();
        }
        for (index, prompt) in [0, 1, 1, 2].into_iter().enumerate() {
            let tokens: Vec<u32> = steps.iter().map(|step| step[index]).collect();
            let alone = cached_logits(&generator, prompts[prompt], &tokens);
            let vocab = generator.config().vocab_size;
            assert_eq!(caches[prompt].logits(), &alone[..vocab]);
            assert_eq!(
                last[index * vocab..][..vocab],
                alone[3 * vocab..],
                "{model} {index}"
            );
        }
    }
}

/// Prompts that can be dealt evenly and one that cannot; sequences enough that threads take shares of them, in unequal parts.
#[test]
fn threads_do_not_change_a_bit_whatever_they_share() {
    // Shares of two and of three threads, not of five.
    const SEQUENCES: usize = 73;
    let on = |threads: usize, run: &(dyn Fn() -> Vec<f32> + Sync)| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(run)
    };
    for (model, precision) in [("llama3", Precision::F32), ("mistral", Precision::Bf16)] {
        let generator = Generator::new(&decoder(&golden(model), Precision::F32), precision);
        for lens in [&[30, 31, 29, 30, 30, 30][..], &[90, 2, 1]] {
            let prompts: Vec<Vec<u32>> = lens
                .iter()
                .zip(0..)
                .map(|(&len, seed)| (0..len).map(|i| 4 + (i * 7 + seed) % 70).collect())
                .collect();
            let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
            let run = || {
                let caches = generator.prefill(&prompts).unwrap();
                let mut found: Vec<f32> = caches.iter().flat_map(|c| c.logits()).copied().collect();
                let caches: Vec<_> = caches.into_iter().map(Arc::new).collect();
                let mut sequences: Vec<_> = (0..SEQUENCES)
                    .map(|index| {
                        Sequence::new(Arc::clone(&caches[index * caches.len() / SEQUENCES]))
                    })
                    .collect();
                for step in 0..3 {
                    let token = |index| 4 + (index as u32 * 5 + step) % 90;
                    let tokens: Vec<u32> = (0..SEQUENCES).map(token).collect();
                    found.extend(generator.step(&mut sequences, &tokens).unwrap());
                }
                found
            };
            let alone = on(1, &run);
            for threads in [2, 3, 5] {
                assert!(
                    on(threads, &run) == alone,
                    "{model} {lens:?} {threads} threads"
                );
            }
        }
    }
}

#[test]
fn detail_33_greedy_decoding_is_the_argmax_of_the_forward_pass() {
    for model in MODELS {
        let decoder = decoder(&golden(model), Precision::F32);
        let generator = Generator::new(&decoder, Precision::F32);
        let prompts = [vec![1, 40, 50], vec![1], vec![1, 60, 61, 62, 63, 64, 65]];
        let settings = GenerateSettings {
            samples: 1,
            ..settings(Sampling::greedy())
        };
        let found = generator.generate(&prompts, &settings).unwrap();
        assert_eq!(found.len(), prompts.len());
        for (prompt, generation) in prompts.iter().zip(&found) {
            assert_eq!(generation.token_ids.len(), settings.max_tokens);
            let whole = [prompt.as_slice(), &generation.token_ids].concat();
            let hidden = decoder.hidden(&sequence(&whole)).unwrap();
            let sources: Vec<usize> = (prompt.len() - 1..whole.len() - 1).collect();
            let logits = floats(decoder.logits(&hidden, &sources));
            let rows = logits.chunks(decoder.config().vocab_size);
            let best: Vec<u32> = rows.map(|row| argmax(row).unwrap() as u32).collect();
            assert_eq!(generation.token_ids, best, "{model}");
            assert_logps(&decoder, prompt, generation);
            assert_eq!(generation.sampling_logps, vec![0.0; best.len()]);
        }
    }
}

#[test]
fn samples_depend_on_seed_prompt_and_index_and_on_nothing_else() {
    let decoder = decoder(&golden("qwen2"), Precision::F32);
    let generator = Generator::new(&decoder, Precision::F32);
    let prompts = [vec![1, 40, 50], vec![1], vec![1, 40, 50], vec![8, 9]];
    let base = GenerateSettings {
        eos: vec![2, 3, 50],
        ..settings(Sampling {
            temperature: 3.0,
            ..Sampling::default()
        })
    };
    let expected = generator.generate(&prompts, &base).unwrap();
    let order: Vec<_> = expected.iter().map(|g| (g.prompt, g.sample)).collect();
    let all = (0..4).flat_map(|prompt| (0..3).map(move |sample| (prompt, sample)));
    assert_eq!(order, all.collect::<Vec<_>>());
    for batch in [1, 5, 100] {
        let settings = GenerateSettings {
            batch,
            ..base.clone()
        };
        assert_eq!(generator.generate(&prompts, &settings).unwrap(), expected);
    }
    assert_eq!(
        generator.generate(&prompts[..2], &base).unwrap(),
        expected[..6]
    );
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let found = pool
            .build()
            .unwrap()
            .install(|| generator.generate(&prompts, &base).unwrap());
        assert_eq!(found, expected);
    }
    let other = GenerateSettings {
        seed: 6,
        ..base.clone()
    };
    assert_ne!(generator.generate(&prompts, &other).unwrap(), expected);
    let texts: std::collections::BTreeSet<_> = expected.iter().map(|g| &g.token_ids).collect();
    assert!(
        texts.len() > 10,
        "samples of equal prompts must differ: {}",
        texts.len()
    );

    for generation in &expected {
        assert_logps(&decoder, &prompts[generation.prompt], generation);
        let (last, earlier) = generation.token_ids.split_last().unwrap();
        assert!(earlier.iter().all(|id| !base.eos.contains(id)));
        let expected = match base.eos.contains(last) {
            true => Finish::Eos,
            false => Finish::Length,
        };
        assert_eq!(generation.finish, expected);
        assert!(expected == Finish::Eos || earlier.len() + 1 == base.max_tokens);
    }
    let stopped = expected.iter().filter(|g| g.finish == Finish::Eos).count();
    assert!(
        (1..12).contains(&stopped),
        "{stopped} of 12 stopped: both ends must be met"
    );
}

/// At temperature 1 and without filters both log-probabilities are one; a filter raises that of what it keeps.
#[test]
fn sampling_log_probabilities_are_of_the_distribution_drawn_from() {
    let generator = Generator::new(&decoder(&golden("llama3"), Precision::F32), Precision::F32);
    let own = generator
        .generate(&[[1, 40]], &settings(Sampling::default()))
        .unwrap();
    assert!(own.iter().all(|g| g.token_logps == g.sampling_logps));
    let sampling = Sampling {
        top_k: Some(4),
        ..Sampling::default()
    };
    for generation in generator.generate(&[[1, 40]], &settings(sampling)).unwrap() {
        let pairs = generation
            .token_logps
            .iter()
            .zip(&generation.sampling_logps);
        assert!(
            pairs
                .clone()
                .all(|(own, drawn)| own < drawn && *drawn <= 0.0)
        );
    }
}

#[test]
fn a_response_ends_at_the_models_last_position() {
    let generator = Generator::new(&decoder(&golden("llama"), Precision::F32), Precision::F32);
    let limit = generator.config().max_positions;
    let settings = GenerateSettings {
        max_tokens: limit,
        samples: 1,
        ..settings(Sampling::greedy())
    };
    let prompt = |len| vec![vec![5; len]];
    let found = generator.generate(&prompt(limit - 3), &settings).unwrap();
    assert_eq!(found[0].token_ids.len(), 3);
    assert_eq!(found[0].finish, Finish::Length);
    let error = generator.generate(&prompt(limit), &settings).unwrap_err();
    assert!(
        error.to_string().contains("max_position_embeddings"),
        "{error}"
    );
    assert_eq!(
        generator
            .generate(&Vec::<Vec<u32>>::new(), &settings)
            .unwrap(),
        []
    );
}

#[test]
fn wrong_input_is_refused_and_broken_weights_are_found() {
    let generator = Generator::new(&decoder(&golden("llama"), Precision::F32), Precision::F32);
    let error = |prompt: &[u32], settings: &GenerateSettings| {
        generator
            .generate(&[prompt], settings)
            .unwrap_err()
            .to_string()
    };
    let fine = settings(Sampling::default());
    assert_eq!(
        error(&[], &fine),
        "`prompt tokens` is 0, expected at least 1"
    );
    assert!(error(&[100], &fine).contains("token id 100"));
    let none = GenerateSettings {
        batch: 0,
        ..fine.clone()
    };
    assert_eq!(error(&[1], &none), "`batch` is 0, expected at least 1");
    let mut sequences = [Sequence::new(Arc::new(
        generator.prefill(&[&[1]]).unwrap().remove(0),
    ))];
    assert!(generator.step(&mut sequences, &[1, 2]).is_err());
    assert!(generator.step(&mut sequences, &[100]).is_err());
    assert_eq!(sequences[0].len(), 1);

    let mut checkpoint = load(&golden("llama")).unwrap();
    let norm = checkpoint.tensors.get_mut("model.norm.weight").unwrap();
    norm.values_mut()[3] = f32::NAN;
    let device = burn::tensor::Device::flex();
    let decoder = Decoder::from_checkpoint(&checkpoint, &device, Precision::F32).unwrap();
    let generator = Generator::new(&decoder, Precision::F32);
    let error = generator.generate(&[[1, 2]], &fine).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFinite);
    assert_eq!(
        error.to_string(),
        "`logits of token 0 of sample 0 of prompt 0` is not finite"
    );
}

#[test]
fn an_adapter_is_merged_into_the_packed_weights() {
    let adapter = LoraAdapter::load(&golden("llama/adapter")).unwrap();
    let adapted = decoder(&golden("llama"), Precision::F32)
        .with_adapter(&adapter)
        .unwrap();
    let generator = Generator::new(&adapted, Precision::F32);
    let expected = &json("llama/adapter/golden.json")["sequences"][0];
    let token_ids = ids(&expected["token_ids"]);
    let found = cached_logits(&generator, &token_ids[..1], &token_ids[1..]);
    let off = difference(&found, numbers(&expected["logits"]));
    assert!(off <= LOGITS, "off from peft by {off:e}");
}

/// peft's adapter covers every linear layer; `q_proj` and `up_proj` alone leave parts of fused products without one.
#[test]
fn an_adapter_beside_the_weights_is_the_merged_one_and_can_be_replaced() {
    let base = decoder(&golden("llama"), Precision::F32);
    let adapter = LoraAdapter::load(&golden("llama/adapter")).unwrap();
    let mut part = adapter.clone();
    part.modules
        .retain(|name, _| name.ends_with("k_proj") || name.ends_with("up_proj"));
    let tokens: Vec<u32> = (0..24).map(|i| 4 + (i * 11) % 90).collect();
    let logits = |generator: &Generator| cached_logits(generator, &tokens[..9], &tokens[9..]);
    let bare = Generator::new(&base, Precision::F32);
    let mut followed = Generator::unmerged(&base, Precision::F32);
    assert_eq!(logits(&followed), logits(&bare));
    for adapter in [&adapter, &part] {
        let adapted = base.clone().with_adapter(adapter).unwrap();
        let merged = logits(&Generator::new(&adapted, Precision::F32));
        let before = followed.clone();
        let expected = logits(&before);
        followed.refresh(&adapted);
        let found = logits(&followed);
        let off = difference(&found, widened(&merged));
        assert!(off <= LOGITS, "off from merged by {off:e}");
        assert!(difference(&found, widened(&logits(&bare))) > 100.0 * LOGITS);
        let fresh = Generator::unmerged(&adapted, Precision::F32);
        assert_eq!(logits(&fresh), found);
        assert_eq!(logits(&before), expected, "a clone keeps its own adapter");
    }
    followed.refresh(&base);
    assert_eq!(logits(&followed), logits(&bare));
}

#[test]
#[should_panic(expected = "Generator::unmerged")]
fn a_merged_adapter_cannot_be_replaced() {
    let base = decoder(&golden("llama"), Precision::F32);
    let adapter = LoraAdapter::load(&golden("llama/adapter")).unwrap();
    let adapted = base.clone().with_adapter(&adapter).unwrap();
    Generator::new(&adapted, Precision::F32).refresh(&base);
}

#[test]
fn bf16_decoding_stays_near_the_packed_pass() {
    for model in MODELS {
        let decoder = decoder(&golden(model), Precision::Bf16);
        let generator = Generator::new(&decoder, Precision::Bf16);
        let token_ids: Vec<u32> = (0..40).map(|i| 4 + (i * 11) % 90).collect();
        let found = cached_logits(&generator, &token_ids[..20], &token_ids[20..]);
        let off = difference(&found, full_logits(&decoder, &token_ids, 19));
        println!("{model}: cached bf16 logits are off by up to {off:e}");
        assert!(off <= BF16_LOGITS, "{model}: off by {off}");
    }
}

fn assert_logps(decoder: &Decoder, prompt: &[u32], generation: &Generation) {
    let mut pack = pivotal_core::Pack::default();
    pack.push(prompt, &[&generation.token_ids]).unwrap();
    let off = difference(
        &generation.token_logps,
        widened(&reference::logps(decoder, &pack)),
    );
    assert!(off <= LOGITS, "log-probabilities off by {off:e}");
}
