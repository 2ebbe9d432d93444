//! peft adapters, in and out.

use std::path::{Path, PathBuf};

use pivotal_model::{AdapterTask, HostTensor, LoraAdapter, load};
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama")
}

fn adapter() -> LoraAdapter {
    LoraAdapter::load(&golden().join("adapter")).unwrap()
}

fn copy() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(golden().join("adapter").join(name), copy.path().join(name)).unwrap();
    }
    copy
}

#[test]
fn what_peft_wrote_fits_its_model() {
    let adapter = adapter();
    assert_eq!(
        (adapter.rank, adapter.alpha, adapter.scale()),
        (4, 8.0, 2.0)
    );
    assert_eq!(adapter.task, AdapterTask::CausalLm);
    assert_eq!(adapter.modules.len(), 2 * 7);
    let module = &adapter.modules["model.layers.1.mlp.down_proj"];
    assert_eq!(module.a.shape(), [4, 56]);
    assert_eq!(module.b.shape(), [32, 4]);
    assert!(adapter.value_head.is_none());
    let config = load(&golden()).unwrap().config;
    adapter.check(&config).unwrap();
    let mut narrow = config.clone();
    narrow.intermediate_size = 55;
    let message = adapter.check(&narrow).unwrap_err().to_string();
    assert!(message.contains("expected [4, 55]"), "{message}");
    let mut shallow = config;
    shallow.layers = 1;
    let message = adapter.check(&shallow).unwrap_err().to_string();
    assert!(message.contains("`model.layers.1."), "{message}");
}

#[test]
fn rank_stabilisation_divides_by_the_root() {
    let mut adapter = adapter();
    adapter.rank_stabilised = true;
    assert_eq!(adapter.scale(), 4.0);
}

#[test]
fn what_is_saved_loads_as_it_was() {
    let mut adapter = adapter();
    let directory = tempfile::tempdir().unwrap();
    adapter.save(directory.path()).unwrap();
    assert_eq!(LoraAdapter::load(directory.path()).unwrap(), adapter);

    adapter.task = AdapterTask::SequenceClassification;
    adapter.value_head = Some(HostTensor::new(vec![1, 32], vec![-0.25; 32]).unwrap());
    adapter.rank_stabilised = true;
    adapter.modules.remove("model.layers.1.mlp.down_proj");
    adapter.save(directory.path()).unwrap();
    let again = LoraAdapter::load(directory.path()).unwrap();
    assert_eq!(again, adapter);
    again.check(&load(&golden()).unwrap().config).unwrap();

    let bytes = std::fs::read(directory.path().join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(config["modules_to_save"], json!(["score"]));
    // No longer the same modules in every layer, so each by its whole path.
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 13);
}

#[test]
fn what_this_cannot_do_is_named() {
    let copy = copy();
    let path = copy.path().join("adapter_config.json");
    let original: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let cases = [
        ("peft_type", json!("IA3")),
        ("bias", json!("all")),
        ("use_dora", json!(true)),
        ("rank_pattern", json!({"q_proj": 8})),
        ("trainable_token_indices", json!([1])),
        ("init_lora_weights", json!("pissa")),
        ("r", json!(0)),
        ("lora_alpha", json!("8")),
        ("use_rslora", json!(1)),
        ("task_type", json!("SEQ_2_SEQ_LM")),
    ];
    for (key, value) in cases {
        let mut config = original.clone();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let message = LoraAdapter::load(copy.path()).unwrap_err().to_string();
        assert!(message.starts_with(&format!("`{key}` in")), "{message}");
    }
    std::fs::write(&path, "{").unwrap();
    assert!(LoraAdapter::load(copy.path()).is_err());
}

#[test]
fn tensors_out_of_place_are_named() {
    let copy = copy();
    let path = copy.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let renamed = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let text = std::str::from_utf8(&bytes[8..8 + header]).unwrap();
        assert!(text.contains(from));
        let mut damaged = bytes.clone();
        damaged[8..8 + header].copy_from_slice(text.replacen(from, to, 1).as_bytes());
        std::fs::write(&path, damaged).unwrap();
        LoraAdapter::load(copy.path()).unwrap_err().to_string()
    };
    let module = "layers.0.mlp.up_proj.lora_";
    let message = renamed(&format!("{module}A.weight"), &format!("{module}C.weight"));
    assert!(
        message.contains("no place") && message.contains("lora_C"),
        "{message}"
    );
    let message = renamed(&format!("{module}B"), "layers.9.mlp.up_proj.lora_B");
    assert!(message.contains("lacks the tensor"), "{message}");
}
