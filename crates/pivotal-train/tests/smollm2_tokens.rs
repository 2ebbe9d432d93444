//! SmolLM2's own vocabulary, out of its GGUF, against transformers' ids and renderings (run with PIVOTAL_SMOLLM2_GGUF set).

use std::path::Path;

use pivotal_data::{ChatTemplate, Message, SpecialTokens, Tokenizer};
use serde_json::Value;

#[test]
#[allow(clippy::print_stderr)]
fn smollm2_tokenises_and_renders_as_transformers_does() {
    let Some(gguf) = std::env::var_os("PIVOTAL_SMOLLM2_GGUF") else {
        eprintln!("skipped: PIVOTAL_SMOLLM2_GGUF is not set");
        return;
    };
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden/smollm2.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let source = pivotal_model::load(Path::new(&gguf))
        .unwrap()
        .tokenizer
        .unwrap();
    let special = SpecialTokens {
        bos: Some(1),
        eos: 2,
        add_bos: Some(false),
    };
    let tokenizer = Tokenizer::new(&source, special).unwrap();
    let cases = |name: &str| golden[name].as_array().unwrap().clone();
    let mut checked = 0;
    for case in ["tokenizer", "texts", "chats"].into_iter().flat_map(cases) {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["token_ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        if let Some(decoded) = case["decoded"].as_str() {
            assert_eq!(tokenizer.decode(&ids).unwrap(), decoded);
        }
        checked += 1;
    }
    assert!(checked > 40);
    let text = |id| tokenizer.token_text(id).unwrap();
    let template = ChatTemplate::new(
        "smollm2",
        golden["chat_template"].as_str().unwrap(),
        Some(&text(1)),
        Some(&text(2)),
    )
    .unwrap();
    for case in cases("chats") {
        let message = |value: &Value| Message {
            role: value["role"].as_str().unwrap().into(),
            content: value["content"].as_str().unwrap().into(),
        };
        let messages: Vec<Message> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(message)
            .collect();
        let rendered = template
            .render(&messages, case["add_generation_prompt"].as_bool().unwrap())
            .unwrap();
        assert_eq!(rendered, case["text"].as_str().unwrap());
    }
}
