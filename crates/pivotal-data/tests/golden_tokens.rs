//! Ids, texts and renderings against `tokenizers` and transformers in Python.

mod support;

use pivotal_core::TokenizerSource;
use pivotal_data::{ChatTemplate, DataError, Message, SpecialTokens, Tokenizer};
use support::{golden, strings, tokenizer, vocabulary};

#[test]
fn ids_agree_with_python_under_every_rule() {
    let golden = golden();
    let texts = strings(&golden["texts"]);
    for (rule, ids) in golden["ids"].as_object().unwrap() {
        let tokenizer = tokenizer(rule, false);
        let ids: Vec<Vec<u32>> = serde_json::from_value(ids.clone()).unwrap();
        for (text, expected) in texts.iter().zip(&ids) {
            assert_eq!(
                &tokenizer.encode(text).unwrap(),
                expected,
                "{rule}: {text:?}"
            );
        }
        assert_eq!(texts.len(), ids.len());
    }
}

#[test]
fn the_rules_differ_where_they_should() {
    let ids = |rule: &str, text: &str| tokenizer(rule, false).encode(text).unwrap();
    assert_eq!(ids("smollm", "1234567890").len(), 10);
    assert_eq!(
        [ids("gpt-2", "1234").len(), ids("llama-bpe", "1234").len()],
        [1, 2]
    );
    // Only Llama 3's looks whole words up before it merges.
    let jumps = tokenizer("llama-bpe", false).token_id("Ġjumps").unwrap();
    assert_eq!(ids("llama-bpe", " jumps"), [jumps]);
    assert!(ids("qwen2", " jumps").len() > 1);
    // Qwen 2's composes accents first.
    assert_eq!(ids("qwen2", "cafe\u{301}"), ids("qwen2", "café"));
    assert_ne!(ids("smollm", "cafe\u{301}"), ids("smollm", "café"));
}

#[test]
fn decoding_and_offsets_give_the_text_back() {
    let tokenizer = tokenizer("smollm", false);
    for text in strings(&golden()["texts"]) {
        let (ids, encoded_offsets) = tokenizer.encode_with_offsets(&text).unwrap();
        let decoded = tokenizer.decode(&ids).unwrap();
        let offsets = tokenizer.text_offsets(&ids).unwrap();
        assert_eq!(offsets.len(), ids.len());
        assert_eq!(encoded_offsets.len(), ids.len());
        for &[start, end] in &offsets {
            assert!(
                decoded.get(start..end).is_some(),
                "{text:?}: {start}..{end}"
            );
        }
        if decoded == text {
            assert_eq!(offsets, encoded_offsets, "{text:?}");
        }
        let texts = tokenizer.token_texts(&ids).unwrap();
        if !texts
            .iter()
            .any(|token| token.contains(char::REPLACEMENT_CHARACTER))
        {
            assert_eq!(texts.concat(), decoded);
        }
    }
}

#[test]
fn special_tokens_are_written_out_or_left_out() {
    let tokenizer = tokenizer("smollm", false);
    let ids = tokenizer.encode("<|im_start|>hi<|im_end|>").unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
    assert_eq!(tokenizer.decode(&ids).unwrap(), "<|im_start|>hi<|im_end|>");
    assert_eq!(tokenizer.decode_plain(&ids).unwrap(), "hi");
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(3) && !tokenizer.is_special(9));
}

#[test]
fn its_json_builds_the_same_tokenizer() {
    let first = tokenizer("llama-bpe", false);
    let special = SpecialTokens {
        bos: Some(1),
        eos: 2,
        add_bos: None,
    };
    let second = Tokenizer::new(&TokenizerSource::Json(first.to_json().to_vec()), special).unwrap();
    let text = "it's 12345 <tool> 日本\n\n";
    assert_eq!(first.encode(text).unwrap(), second.encode(text).unwrap());
    assert!(!second.adds_bos());
}

#[test]
fn a_json_tokenizers_own_additions_are_set_aside() {
    let base = tokenizer("smollm", false);
    let mut json: serde_json::Value = serde_json::from_slice(base.to_json()).unwrap();
    json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    json["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}});
    let special = SpecialTokens {
        bos: Some(1),
        eos: 2,
        add_bos: None,
    };
    let bytes = json.to_string().into_bytes();
    let tokenizer = Tokenizer::new(&TokenizerSource::Json(bytes), special).unwrap();
    let text = "the quick brown fox jumps over the lazy dog";
    assert_eq!(tokenizer.encode(text).unwrap(), base.encode(text).unwrap());
    assert!(
        tokenizer.adds_bos(),
        "the post-processor says that text starts with BOS"
    );
}

#[test]
fn bad_vocabularies_are_refused() {
    let build = |change: &dyn Fn(&mut pivotal_core::BpeVocabulary)| {
        let mut vocabulary = vocabulary("smollm");
        change(&mut vocabulary);
        let special = SpecialTokens {
            bos: None,
            eos: 2,
            add_bos: None,
        };
        Tokenizer::new(&TokenizerSource::Bpe(vocabulary), special)
            .unwrap_err()
            .to_string()
    };
    let messages = [
        build(&|v| v.pre_tokenizer = "klingon".into()),
        build(&|v| v.tokens[7] = v.tokens[8].clone()),
        build(&|v| v.merges[0] = "nospace".into()),
        build(&|v| v.merges[1] = "Ġ ☃".into()),
        build(&|v| v.kinds.truncate(5)),
    ];
    insta::assert_snapshot!(messages.join("\n"), @r#"
unknown pre-tokenizer `klingon`, expected one of default, gpt-2, phi-2, mpt, olmo, jais, smollm, starcoder, refact, codeshell, llama-bpe, llama3, llama-v3, qwen2, deepseek-r1-qwen; or give a `tokenizer.json`
tokenizer vocabulary: `tokens` entry 8: expected a text no other token has, got `%`
tokenizer vocabulary: `merges` entry 0: expected two tokens with a space between, got `nospace`
tokenizer vocabulary: `merges` entry 1: expected two tokens whose union is a token too, got `Ġ ☃`
tokenizer vocabulary: `kinds` entry 5: expected one kind a token, got `5 kinds for 1749 tokens`
"#);
}

#[test]
fn ids_out_of_the_vocabulary_are_refused() {
    let tokenizer = tokenizer("smollm", false);
    let beyond = tokenizer.vocabulary_size() as u32;
    for result in [
        tokenizer.decode(&[4, beyond]),
        tokenizer.decode_plain(&[beyond]),
        tokenizer.token_text(beyond),
    ] {
        assert!(matches!(result, Err(DataError::TokenId { id, .. }) if id == beyond));
    }
    let special = SpecialTokens {
        bos: None,
        eos: beyond,
        add_bos: None,
    };
    let source = TokenizerSource::Bpe(vocabulary("smollm"));
    assert!(matches!(
        Tokenizer::new(&source, special),
        Err(DataError::TokenId { .. })
    ));
}

#[test]
fn chats_render_as_transformers_renders_them() {
    let golden = golden();
    for (name, source) in golden["templates"].as_object().unwrap() {
        let template =
            ChatTemplate::new(name, source.as_str().unwrap(), Some("<s>"), Some("</s>")).unwrap();
        let mut expected = strings(&golden["rendered"][name]).into_iter();
        for chat in golden["chats"].as_array().unwrap() {
            let message = |value: &serde_json::Value| Message {
                role: value["role"].as_str().unwrap().into(),
                content: value["content"].as_str().unwrap().into(),
            };
            let chat: Vec<Message> = chat.as_array().unwrap().iter().map(message).collect();
            for add_generation_prompt in [false, true] {
                let rendered = template.render(&chat, add_generation_prompt).unwrap();
                assert_eq!(rendered, expected.next().unwrap(), "{name}: {chat:?}");
            }
        }
        assert_eq!(expected.next(), None);
    }
}
