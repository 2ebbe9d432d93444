//! Hugging Face directories, in and out, and what a damaged one gets.

mod memory;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use pivotal_core::{ErrorKind, HasKind, TokenizerSource};
use pivotal_kernels::Precision;
use pivotal_model::{Checkpoint, Decoder, Error, HostTensor, RopeScaling, load, save};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Frequencies in the golden files come from transformers in f32.
const FREQUENCY_TOLERANCE: f64 = 1e-6;

/// Far above what any file here needs, far below what a hostile length asks for.
const PEAK_BYTES: u64 = 512 << 20;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// A copy of the golden Llama, to damage.
fn copy() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(golden("llama").join(name), copy.path().join(name)).unwrap();
    }
    copy
}

fn fault(directory: &Path) -> String {
    let error = load(directory).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Input, "{error}");
    error.to_string()
}

/// Bits, because `==` on floats would pass over signed zeros.
fn assert_same_bits(got: &Checkpoint, expected: &Checkpoint) {
    assert!(got.tensors.keys().eq(expected.tensors.keys()));
    for (name, tensor) in &got.tensors {
        let other = &expected.tensors[name];
        assert_eq!(tensor.shape(), other.shape(), "{name}");
        let bits = |tensor: &HostTensor| tensor.values().iter().map(|v| v.to_bits()).collect();
        let (got, expected): (Vec<u32>, Vec<u32>) = (bits(tensor), bits(other));
        assert_eq!(got, expected, "{name}");
    }
}

#[test]
fn values_are_read_when_they_are_asked_for_and_once() {
    let directory = copy();
    let expected = load(&golden("llama")).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let [first, mut changed, taken] = [(); 3].map(|()| load(directory.path()).unwrap());
    // A map outlives the name of its file.
    std::fs::remove_file(directory.path().join("model.safetensors")).unwrap();
    assert_same_bits(&first, &expected);
    let once = first.tensors[name].values().as_ptr();
    assert_eq!(first.tensors[name].values().as_ptr(), once);
    assert!(first.tensors == expected.tensors);
    let changed = changed.tensors.get_mut(name).unwrap();
    changed.values_mut()[0] = 7.0;
    assert_eq!(changed.values()[0], 7.0);
    assert_eq!(changed.values()[1..], expected.tensors[name].values()[1..]);
    assert_ne!(*changed, expected.tensors[name]);
    assert_eq!(changed.clone().into_values()[0], 7.0);
    let taken = taken.tensors[name].clone().into_values();
    assert_eq!(taken, expected.tensors[name].values());
}

#[test]
fn golden_checkpoints_load_with_transformers_frequencies() {
    for name in ["llama", "llama3", "llama_bf16", "mistral", "qwen2"] {
        let checkpoint = load(&golden(name)).unwrap();
        let config = &checkpoint.config;
        let bytes = std::fs::read(golden(name).join("golden.json")).unwrap();
        let expected: Value = serde_json::from_slice(&bytes).unwrap();
        let expected = expected["inverse_frequencies"].as_array().unwrap();
        let got = config.inverse_frequencies();
        assert_eq!(got.len(), expected.len(), "{name}");
        for (got, expected) in got.iter().zip(expected) {
            let expected = expected.as_f64().unwrap();
            assert!(
                (f64::from(*got) - expected).abs() <= FREQUENCY_TOLERANCE * expected,
                "{name}: {got} is not {expected}"
            );
        }
        let names: Vec<String> = config.tensors().map(|(name, _)| name).collect();
        assert_eq!(checkpoint.tensors.len(), names.len(), "{name}");
        assert_eq!(config.qkv_bias, name == "qwen2");
        assert!(matches!(
            checkpoint.tokenizer,
            Some(TokenizerSource::Json(_))
        ));
        assert!(checkpoint.chat_template.unwrap().contains("messages"));
        assert_eq!(config.special_ids.eos, [2]);
    }
    let scaled = load(&golden("llama3")).unwrap().config.rope_scaling;
    assert!(matches!(scaled, RopeScaling::Llama3 { .. }));
}

#[test]
fn both_configs_of_one_model_are_the_same() {
    for name in ["llama", "llama3"] {
        let directory = tempfile::tempdir().unwrap();
        for (from, to) in [
            ("config.rope_parameters.json", "config.json"),
            ("model.safetensors", "model.safetensors"),
        ] {
            std::fs::copy(golden(name).join(from), directory.path().join(to)).unwrap();
        }
        let new = load(directory.path()).unwrap();
        assert_eq!(new.config, load(&golden(name)).unwrap().config);
    }
}

#[test]
fn what_is_saved_loads_with_the_same_bits_and_saves_to_the_same_bytes() {
    for name in ["llama", "llama3", "llama_bf16", "mistral", "qwen2"] {
        let checkpoint = load(&golden(name)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        save(&checkpoint, directory.path()).unwrap();
        let again = load(directory.path()).unwrap();
        assert_same_bits(&again, &checkpoint);
        assert_eq!(again, checkpoint);

        let weights = || std::fs::read(directory.path().join("model.safetensors")).unwrap();
        let first = weights();
        save(&again, directory.path()).unwrap();
        assert_eq!(first, weights());
    }
}

#[test]
fn a_value_head_survives_and_stands_in_for_the_vocabulary_head() {
    let mut checkpoint = load(&golden("llama3")).unwrap();
    let hidden = checkpoint.config.hidden_size;
    let head = HostTensor::new(vec![1, hidden], vec![0.5; hidden]).unwrap();
    checkpoint.tensors.insert("score.weight".into(), head);
    checkpoint.tensors.remove("lm_head.weight").unwrap();
    let directory = tempfile::tempdir().unwrap();
    save(&checkpoint, directory.path()).unwrap();
    let again = load(directory.path()).unwrap();
    assert_eq!(again.value_head(), checkpoint.value_head());
    assert!(again.vocabulary_head().is_err());
    assert!(load(&golden("llama3")).unwrap().vocabulary_head().is_ok());
}

#[test]
fn a_decoder_leaves_nothing_in_the_file_it_came_from() {
    let mut checkpoint = load(&golden("llama")).unwrap();
    let hidden = checkpoint.config.hidden_size;
    let head = HostTensor::new(vec![1, hidden], vec![0.5; hidden]).unwrap();
    checkpoint
        .tensors
        .insert("score.weight".into(), head.clone());
    let directory = tempfile::tempdir().unwrap();
    save(&checkpoint, directory.path()).unwrap();
    let mut again = load(directory.path()).unwrap();
    Decoder::take_from(&mut again, &Device::flex(), Precision::F32).unwrap();
    // In place, as another program may.
    let weights = directory.path().join("model.safetensors");
    let bytes = std::fs::metadata(&weights).unwrap().len();
    std::fs::write(weights, vec![0; bytes as usize]).unwrap();
    assert_eq!(again.value_head(), Some(&head));
}

#[test]
fn paths_that_are_no_models_say_what_would_be() {
    let message = |path: &str| load(Path::new(path)).unwrap_err().to_string();
    assert!(message("HuggingFaceTB/SmolLM2-135M").contains("hub id"));
    assert!(message("./nowhere/model").contains("nowhere"));
    assert!(message("nowhere/model.gguf").contains("`nowhere/model.gguf`"));
    let directory = tempfile::tempdir().unwrap();
    assert!(fault(directory.path()).contains("is not a model"));
    std::fs::write(directory.path().join("pytorch_model.bin"), b"").unwrap();
    let config = golden("llama").join("config.json");
    std::fs::copy(config, directory.path().join("config.json")).unwrap();
    assert!(fault(directory.path()).contains("has no weights"));
}

#[test]
fn special_ids_and_templates_come_from_their_own_files() {
    let copy = copy();
    let write = |name: &str, text: &str| std::fs::write(copy.path().join(name), text).unwrap();
    write(
        "generation_config.json",
        r#"{"eos_token_id": [7, 2], "pad_token_id": 9}"#,
    );
    write(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#,
    );
    let checkpoint = load(copy.path()).unwrap();
    assert_eq!(checkpoint.config.special_ids.eos, [2, 7]);
    assert_eq!(checkpoint.config.special_ids.pad, Some(3));
    assert_eq!(checkpoint.chat_template.as_deref(), Some("d"));
    write("chat_template.jinja", "own file");
    let checkpoint = load(copy.path()).unwrap();
    assert_eq!(checkpoint.chat_template.as_deref(), Some("own file"));
    write("tokenizer_config.json", "[]");
    assert!(fault(copy.path()).contains("tokenizer_config.json"));
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    let copy = copy();
    let path = copy.path().join("config.json");
    let original: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let with = |key: &str, value: Value| {
        let mut config = original.clone();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        fault(copy.path())
    };
    let message = with("num_hidden_layers", json!(3));
    assert!(message.contains("lacks the tensors `model.layers.2.input_layernorm.weight`"));
    let message = with("num_hidden_layers", json!(1 << 28));
    assert!(message.contains("more"), "{message}");
    let message = with("num_hidden_layers", json!(1));
    assert!(message.contains("no place") && message.contains("`model.layers.1."));
    let message = with("intermediate_size", json!(57));
    assert!(message.contains("expected [32, 57]"), "{message}");
    let message = with("tie_word_embeddings", json!(false));
    assert!(message.ends_with("lacks the tensor `lm_head.weight`"));
}

#[test]
fn an_index_is_held_to_its_files() {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden("mistral")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    load(copy.path()).unwrap();
    let path = copy.path().join("model.safetensors.index.json");
    let original: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let with = |tensor: &str, file: Value| {
        let mut index = original.clone();
        index["weight_map"][tensor] = file;
        std::fs::write(&path, index.to_string()).unwrap();
        fault(copy.path())
    };
    for file in [
        json!("../model.safetensors"),
        json!("/etc/passwd"),
        json!(3),
        json!(""),
    ] {
        assert!(with("model.norm.weight", file).contains("weight_map.model.norm.weight"));
    }
    assert!(with("model.norm.weight", json!("gone.safetensors")).contains("gone.safetensors"));
    let shard = "model-00001-of-00002.safetensors";
    let message = with("no.such.tensor", json!(shard));
    assert!(message.contains(shard) && message.contains("`no.such.tensor`"));
    std::fs::write(&path, original.to_string()).unwrap();
    let second = "model-00002-of-00002.safetensors";
    std::fs::copy(copy.path().join(shard), copy.path().join(second)).unwrap();
    assert!(load(copy.path()).is_err());
}

#[test]
fn a_flipped_bit_in_a_saved_file_is_found_by_its_checksum() {
    let directory = tempfile::tempdir().unwrap();
    save(&load(&golden("llama")).unwrap(), directory.path()).unwrap();
    let path = directory.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(fault(directory.path()).contains("is damaged"));
}

/// A file with one tensor called `x`, its header as given.
fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn hostile_safetensors_headers_are_refused_without_the_memory_they_ask_for() {
    let copy = copy();
    let path = copy.path().join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let tensor = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let mut cases: Vec<Vec<u8>> = [0, 1, 7, 8, 9, 8 + header / 2, 8 + header - 1, 8 + header]
        .into_iter()
        .chain([good.len() / 2, good.len() - 1])
        .map(|length| good[..length].to_vec())
        .collect();
    for length in [
        u64::MAX,
        u64::MAX - 8,
        1 << 40,
        100_000_001,
        good.len() as u64,
    ] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        cases.push(bytes);
    }
    cases.push([&good[..], b"x"].concat());
    let two = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#;
    let twice = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    cases.extend([
        with_header(&tensor("F32", "[1]", 4, 8), &[0; 4]),
        with_header(&tensor("F32", "[2]", 0, 4), &[0; 4]),
        with_header(&tensor("F32", "[4294967296,4294967296]", 0, 0), &[]),
        with_header(&tensor("F32", "[1]", 0, u64::MAX), &[0; 4]),
        with_header(&tensor("F99", "[1]", 0, 4), &[0; 4]),
        with_header(&tensor("F32", "[-1]", 0, 4), &[0; 4]),
        with_header(two, &[0; 6]),
        with_header(twice, &[0; 8]),
        with_header("{\"\u{fffd}", &[]),
        [&8u64.to_le_bytes()[..], b"{\"\xff\xfe\":{}"].concat(),
        with_header("[[[[[[[[", &[]),
    ]);
    let growth = memory::peak_growth(|| {
        for (index, bytes) in cases.iter().enumerate() {
            std::fs::write(&path, bytes).unwrap();
            let message = fault(copy.path());
            assert!(message.contains("model.safetensors"), "{index}: {message}");
        }
    });
    assert!(growth < PEAK_BYTES, "{growth} bytes");
}

#[test]
fn a_tensor_of_another_type_is_named_with_the_types_that_are_read() {
    let copy = copy();
    let path = copy.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    // Same width, so that the header stays valid.
    let at = bytes
        .windows(5)
        .position(|window| window == b"\"F32\"")
        .unwrap();
    let mut damaged = bytes.clone();
    damaged[at + 1..at + 4].copy_from_slice(b"I32");
    std::fs::write(&path, damaged).unwrap();
    let error = load(copy.path()).unwrap_err();
    assert!(matches!(error, Error::TensorType { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("has type I32, expected one of F32, F16, BF16")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A law, not a table: whatever a few bytes become, the loader answers, and within bounds.
    #[test]
    fn no_mutation_of_a_file_panics_or_takes_memory_it_does_not_need(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        config in any::<bool>(),
    ) {
        let copy = copy();
        let path = copy.path().join(if config { "config.json" } else { "model.safetensors" });
        let mut bytes = std::fs::read(&path).unwrap();
        for (index, byte, in_header) in edits {
            // Most of the file is weights, where nothing can go wrong: half of the edits go to the header.
            let reach = if in_header { bytes.len().min(3000) } else { bytes.len() };
            let at = index.index(reach);
            bytes[at] = byte;
        }
        if let Some(index) = cut {
            bytes.truncate(index.index(bytes.len()));
        }
        std::fs::write(&path, bytes).unwrap();
        let growth = memory::peak_growth(|| {
            if let Err(error) = load(copy.path()) {
                assert_eq!(error.kind(), ErrorKind::Input, "{error}");
                assert!(!error.to_string().is_empty());
            }
        });
        prop_assert!(growth < PEAK_BYTES, "{} bytes", growth);
    }
}
