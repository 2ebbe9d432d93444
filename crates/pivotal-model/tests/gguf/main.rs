//! GGUF files: values against the `gguf` package, names and row order against transformers, and hostile bytes.

mod builder;
mod hostile;
#[path = "../memory/mod.rs"]
mod memory;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use builder::{Builder, metadata, with_tensors};
use pivotal_core::{TokenKind, TokenizerSource};
use pivotal_model::{Checkpoint, Error, RopeScaling, load};
use safetensors::SafeTensors;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn load_bytes(bytes: &[u8]) -> Result<Checkpoint, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    load(&path)
}

#[test]
fn every_block_format_expands_to_the_bits_of_the_gguf_package() {
    let checkpoint = load(&golden("gguf/blocks.gguf")).unwrap();
    let bytes = std::fs::read(golden("gguf/blocks.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(checkpoint.tensors.len(), expected.len());
    for (name, tensor) in &checkpoint.tensors {
        let view = expected.tensor(name).unwrap();
        assert_eq!(tensor.shape(), view.shape(), "{name}");
        for (index, (got, expected)) in tensor
            .values()
            .iter()
            .zip(view.data().chunks_exact(4))
            .enumerate()
        {
            let expected = f32::from_le_bytes(expected.try_into().unwrap());
            assert_eq!(
                got.to_bits(),
                expected.to_bits(),
                "{name}[{index}]: {got} {expected}"
            );
        }
    }
}

#[test]
fn the_metadata_of_a_file_become_a_config_and_a_vocabulary() {
    let checkpoint = load(&golden("gguf/blocks.gguf")).unwrap();
    let config = &checkpoint.config;
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (4, 2, 8));
    assert_eq!((config.vocab_size, config.hidden_size), (16, 256));
    assert_eq!(config.rms_norm_eps, 1e-5);
    assert!(!config.tie_word_embeddings && !config.qkv_bias);
    assert_eq!(
        (config.special_ids.bos, config.special_ids.add_bos),
        (Some(0), false)
    );
    let Some(TokenizerSource::Bpe(vocabulary)) = &checkpoint.tokenizer else {
        panic!("{:?}", checkpoint.tokenizer);
    };
    assert_eq!(vocabulary.tokens[14], "ab");
    assert_eq!(vocabulary.merges, ["a b", "ab c"]);
    assert_eq!(
        vocabulary.kinds[..2],
        [TokenKind::Control, TokenKind::Normal]
    );
    assert_eq!(vocabulary.pre_tokenizer, "smollm");
    assert!(
        checkpoint
            .chat_template
            .unwrap()
            .contains("message.content")
    );
}

#[test]
fn a_checkpoint_is_the_same_from_a_directory_and_from_a_gguf() {
    for (name, architecture) in [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2")] {
        let expected = load(&golden(name)).unwrap();
        let builder = metadata(&expected, architecture);
        let builder = with_tensors(builder, &expected, architecture == "llama");
        let got = load_bytes(&builder.bytes()).unwrap();
        assert_eq!(got.tensors, expected.tensors, "{name}");
        let mut config = expected.config;
        // The format says neither that a Llama is a Mistral nor, for these, its window.
        config.family = got.config.family;
        config.sliding_window = got.config.sliding_window;
        assert_eq!(got.config, config, "{name}");
    }
}

/// The divisors of the golden Llama 3, from transformers' scaled frequencies.
fn llama3_divisors(checkpoint: &Checkpoint) -> Vec<f32> {
    let bytes = std::fs::read(golden("llama3/golden.json")).unwrap();
    let expected: Value = serde_json::from_slice(&bytes).unwrap();
    let scaled = expected["inverse_frequencies"].as_array().unwrap();
    let (theta, size) = (checkpoint.config.rope_theta, checkpoint.config.head_dim);
    let plain = (0..size / 2).map(|pair| theta.powf(-((2 * pair) as f64) / size as f64));
    plain
        .zip(scaled)
        .map(|(plain, scaled)| (plain / scaled.as_f64().unwrap()) as f32)
        .collect()
}

#[test]
fn llama3_scaling_is_read_back_from_its_divisors() {
    let expected = load(&golden("llama3")).unwrap();
    let divisors = llama3_divisors(&expected);
    assert!(divisors[0] == 1.0 && *divisors.last().unwrap() > 7.9);
    let builder = with_tensors(metadata(&expected, "llama"), &expected, true);
    let file = |divisors: &[f32]| {
        let builder = builder.clone();
        load_bytes(
            &builder
                .tensor("rope_freqs.weight", &[divisors.len()], divisors)
                .bytes(),
        )
    };
    let got = file(&divisors).unwrap();
    let frequencies = got.config.inverse_frequencies();
    for (got, expected) in frequencies
        .iter()
        .zip(expected.config.inverse_frequencies())
    {
        assert!(
            (got - expected).abs() <= 1e-5 * expected,
            "{got} {expected}"
        );
    }
    assert_eq!(got.tensors, expected.tensors);
    assert!(matches!(
        got.config.rope_scaling,
        RopeScaling::Llama3 { .. }
    ));

    let linear = file(&vec![4.0; divisors.len()]).unwrap();
    assert_eq!(
        linear.config.rope_scaling,
        RopeScaling::Linear { factor: 4.0 }
    );
    let none = file(&vec![1.0; divisors.len()]).unwrap();
    assert_eq!(none.config.rope_scaling, RopeScaling::None);
    let mut odd = divisors.clone();
    odd[1] = 3.0;
    assert!(
        file(&odd)
            .unwrap_err()
            .to_string()
            .contains("`rope_freqs.weight`")
    );
    assert!(
        file(&divisors[1..])
            .unwrap_err()
            .to_string()
            .contains("has shape")
    );
}

#[test]
fn metadata_that_no_decoder_here_has_are_named() {
    let llama = load(&golden("llama")).unwrap();
    let file = |change: &dyn Fn(Builder) -> Builder| {
        let builder = with_tensors(metadata(&llama, "llama"), &llama, true);
        load_bytes(&change(builder).bytes())
            .unwrap_err()
            .to_string()
    };
    let cases: [(&dyn Fn(Builder) -> Builder, &str); 7] = [
        (
            &|b| b.text("llama.rope.scaling.type", "yarn"),
            "`llama.rope.scaling.type`",
        ),
        (
            &|b| b.text("llama.rope.scaling.type", "linear"),
            "`llama.rope.scaling.factor`",
        ),
        (
            &|b| b.size("llama.rope.dimension_count", 4),
            "the size of a head",
        ),
        (
            &|b| b.text("tokenizer.ggml.model", "llama"),
            "byte-level BPE",
        ),
        (
            &|b| b.text("tokenizer.ggml.model", "gpt2"),
            "lacks the key `tokenizer.ggml.tokens`",
        ),
        (
            &|b| {
                b.text("tokenizer.ggml.pre", "x")
                    .float("tokenizer.chat_template", 1.0)
            },
            "a string",
        ),
        (
            &|b| b.tensor("blk.0.ffn_gate_inp.weight", &[1], &[0.0]),
            "no place",
        ),
    ];
    for (change, expected) in cases {
        let message = file(change);
        assert!(message.contains(expected), "{message} has no {expected}");
    }
    let other = Builder::default()
        .text("general.architecture", "gemma2")
        .bytes();
    let message = load_bytes(&other).unwrap_err().to_string();
    assert!(message.contains("architecture `gemma2`"), "{message}");
    let none = load_bytes(&Builder::default().bytes())
        .unwrap_err()
        .to_string();
    assert!(
        none.contains("lacks the key `general.architecture`"),
        "{none}"
    );
    let bare = metadata(&llama, "llama").bytes();
    let message = load_bytes(&bare).unwrap_err().to_string();
    assert!(message.contains("`token_embd.weight`"), "{message}");
}

#[test]
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn smollm2_loads_from_the_file_that_its_package_ships() {
    let Some(path) = std::env::var_os("PIVOTAL_SMOLLM2_GGUF") else {
        println!("skipped: PIVOTAL_SMOLLM2_GGUF names no file");
        return;
    };
    let checkpoint = load(Path::new(&path)).unwrap();
    let config = &checkpoint.config;
    let bytes = std::fs::read(golden("smollm2.json")).unwrap();
    let expected: Value = serde_json::from_slice(&bytes).unwrap();
    let sizes: BTreeMap<&str, usize> = [
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_hidden_layers", config.layers),
        ("num_attention_heads", config.heads),
        ("num_key_value_heads", config.kv_heads),
    ]
    .into();
    for (key, size) in sizes {
        assert_eq!(expected["config"][key], size, "{key}");
    }
    assert!(config.tie_word_embeddings);
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-5, 1e5));
    assert_eq!(
        checkpoint.chat_template.as_deref(),
        expected["chat_template"].as_str()
    );
    let parameters: usize = checkpoint
        .tensors
        .values()
        .map(|tensor| tensor.values().len())
        .sum();
    assert_eq!(parameters, 134_515_008);
    let Some(TokenizerSource::Bpe(vocabulary)) = &checkpoint.tokenizer else {
        panic!("{:?}", checkpoint.tokenizer);
    };
    assert_eq!(vocabulary.tokens.len(), 49152);
    assert_eq!(vocabulary.tokens[1], "<|im_start|>");
}
