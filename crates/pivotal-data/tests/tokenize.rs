//! Rows to ids: the prefix law, BOS and EOS, limits, masks, external columns.

mod support;

use pivotal_data::{
    ChatTemplate, DataSet, Limits, Prefix, ReadOptions, TokenizeOptions, Tokenizer, tokenize_pairs,
    tokenize_prompts, tokenize_responses,
};
use proptest::prelude::*;
use support::{golden, tokenizer};

fn data(text: &str) -> DataSet {
    DataSet::from_jsonl("data.jsonl", text).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new("test", source, Some("<|im_start|>"), Some("<|im_end|>")).unwrap()
}

fn smollm_template() -> ChatTemplate {
    template(golden()["templates"]["smollm"].as_str().unwrap())
}

fn limits(limits: Limits) -> TokenizeOptions {
    TokenizeOptions {
        limits,
        ..TokenizeOptions::default()
    }
}

const PAIR: &str =
    r#"{"prompt": "The sky is", "chosen": " blue", "rejected": " the colour of grass"}"#;

fn pair_fault(line: &str, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> String {
    let options = TokenizeOptions::default();
    tokenize_pairs(&data(line), tokenizer, template, &options)
        .unwrap_err()
        .to_string()
}

#[test]
fn detail_02_a_text_pair_has_one_eos_and_the_joint_ids() {
    let tokenizer = tokenizer("smollm", false);
    let done = tokenize_pairs(&data(PAIR), &tokenizer, None, &TokenizeOptions::default()).unwrap();
    let pair = &done.items[0];
    let joint = tokenizer.encode("The sky is the colour of grass").unwrap();
    assert_eq!(
        [pair.prompt.as_slice(), &pair.rejected].concat(),
        [joint.as_slice(), &[2]].concat()
    );
    assert_eq!((pair.id, pair.chosen.last()), (1, Some(&2)));
    assert_eq!(
        (
            done.dropped,
            done.truncated_prompts,
            done.truncated_responses
        ),
        (0, 0, 0)
    );
    // Written out at the end it is not doubled.
    let line = PAIR.replace(" blue", " blue<|im_end|>");
    let again =
        tokenize_pairs(&data(&line), &tokenizer, None, &TokenizeOptions::default()).unwrap();
    assert_eq!(again.items, done.items);
}

#[test]
fn detail_02_bos_stands_once_where_the_model_wants_it() {
    let with_bos = tokenizer("smollm", true);
    let options = TokenizeOptions::default();
    let prompt = |text: &str| {
        let line = serde_json::json!({ "prompt": text }).to_string();
        tokenize_prompts(&data(&line), &with_bos, None, &options)
            .map(|done| done.items[0].prompt.clone())
    };
    let plain = prompt("hello").unwrap();
    assert_eq!(plain[0], 1);
    assert_eq!(prompt("<|im_start|>hello").unwrap(), plain);
    assert_eq!(prompt("").unwrap(), [1], "BOS alone is a prompt");
    let doubled = prompt("<|im_start|><|im_start|>hello")
        .unwrap_err()
        .to_string();
    assert_eq!(
        doubled,
        "`data.jsonl`, row 1: column `prompt`: two BOS tokens at the start of the prompt, expected one"
    );
}

#[test]
fn detail_01_a_prompt_that_merges_into_the_response_is_refused_or_tokenised_apart() {
    let tokenizer = tokenizer("smollm", false);
    let line = r#"{"prompt": "The sky is ", "chosen": "the", "rejected": "a"}"#;
    insta::assert_snapshot!(pair_fault(line, &tokenizer, None), @r#"
`data.jsonl`, row 1: column `chosen`: the prompt is not a token prefix of prompt + response: token 4 is " " in the prompt alone and " the" in the joint text; end the prompt on a token boundary (a trailing space belongs to the response), or set `prefix` to `parts`
"#);
    let options = TokenizeOptions {
        prefix: Prefix::Parts,
        ..TokenizeOptions::default()
    };
    let done = tokenize_pairs(&data(line), &tokenizer, None, &options).unwrap();
    assert_eq!(
        done.items[0].prompt,
        tokenizer.encode("The sky is ").unwrap()
    );
    assert_eq!(
        done.items[0].chosen,
        [tokenizer.encode("the").unwrap(), vec![2]].concat()
    );
}

#[test]
fn faults_of_rows_name_them() {
    let tokenizer = tokenizer("smollm", false);
    let chat = r#"{"prompt": [{"role": "user", "content": "x"}], "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}"#;
    let other_end = template("{% for m in messages %}{{ m.content }}<|endoftext|>\n{% endfor %}");
    let unstable = template(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    );
    let raising = template("{{ raise_exception('no users') }}");
    let messages = [
        pair_fault(chat, &tokenizer, None),
        pair_fault(chat, &tokenizer, Some(&other_end)),
        pair_fault(chat, &tokenizer, Some(&unstable)),
        pair_fault(chat, &tokenizer, Some(&raising)),
        pair_fault(
            r#"{"prompt": "", "chosen": "a", "rejected": "b"}"#,
            &tokenizer,
            None,
        ),
        pair_fault(
            r#"{"prompt": "p", "chosen": " a<|im_end|> b", "rejected": " b"}"#,
            &tokenizer,
            None,
        ),
        pair_fault(
            r#"{"prompt": "p", "chosen": "<|im_end|>", "rejected": " b"}"#,
            &tokenizer,
            None,
        ),
        pair_fault(
            r#"{"prompt": "p", "chosen": " a", "rejected": " b", "chosen_signal": [1, 2, 3]}"#,
            &tokenizer,
            None,
        ),
        pair_fault(
            r#"{"prompt": "p", "chosen": " a", "rejected": " b", "rejected_cuts": [1, 1]}"#,
            &tokenizer,
            None,
        ),
        pair_fault(
            r#"{"prompt": "p", "chosen": " a", "rejected": " b", "rejected_cuts": [0]}"#,
            &tokenizer,
            None,
        ),
        pair_fault(r#"{"text": "p"}"#, &tokenizer, None),
    ];
    insta::assert_snapshot!(messages.join("\n"), @r#"
`data.jsonl`, row 1: column `prompt` holds messages, but the model has no chat template
`data.jsonl`, row 1: column `chosen`: chat template `test` ends the assistant's turn with `<|endoftext|>`, but EOS is `<|im_end|>`: generation would never stop there; set EOS to `<|endoftext|>`
`data.jsonl`, row 1: column `chosen`: chat template `test` renders the conversation before message 1 differently when that message follows (they part at byte 0)
`data.jsonl`, row 1: column `prompt`: chat template `test`, line 1, message 0: no users
`data.jsonl`, row 1: column `prompt`: the prompt has no token; a response needs at least one before it
`data.jsonl`, row 1: column `chosen`: the response holds the end-of-sequence token `<|im_end|>` at token 1, before its end
`data.jsonl`, row 1: column `chosen`: the response is empty
`data.jsonl`, row 1: column `chosen_signal`: 3 values, expected 2, one for each token of the response with its EOS
`data.jsonl`, row 1: column `rejected_cuts`: cut 1 is 1, expected a token index above 1 and below 2
`data.jsonl`, row 1: column `rejected_cuts`: cut 0 is 0, expected a token index above 0 and below 2
`data.jsonl` has the shape `text`, expected preferences
"#);
    let small = TokenizeOptions {
        vocabulary_size: Some(10),
        ..TokenizeOptions::default()
    };
    let error = tokenize_pairs(&data(PAIR), &tokenizer, None, &small)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("is out of the model's vocabulary of 10"),
        "{error}"
    );
}

#[test]
fn a_chat_response_ends_at_the_templates_own_eos() {
    let tokenizer = tokenizer("smollm", false);
    let line = r#"{"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello"}], "rejected": [{"role": "assistant", "content": "Go away"}]}"#;
    let template = smollm_template();
    let done = tokenize_pairs(
        &data(line),
        &tokenizer,
        Some(&template),
        &TokenizeOptions::default(),
    )
    .unwrap();
    let pair = &done.items[0];
    assert!(
        tokenizer
            .decode(&pair.prompt)
            .unwrap()
            .ends_with("<|im_end|>\n<|im_start|>assistant\n")
    );
    assert_eq!(tokenizer.decode(&pair.chosen).unwrap(), "Hello<|im_end|>");
    assert_eq!(
        tokenizer.decode(&pair.rejected).unwrap(),
        "Go away<|im_end|>"
    );
    // The implicit form of the same row.
    let implicit = r#"{"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away"}]}"#;
    let same = tokenize_pairs(
        &data(implicit),
        &tokenizer,
        Some(&template),
        &TokenizeOptions::default(),
    )
    .unwrap();
    assert_eq!(same.items, done.items);
}

#[test]
fn detail_05_limits_cut_prompts_in_front_and_responses_behind() {
    let with_bos = tokenizer("smollm", true);
    let line = r#"{"prompt": "one two three four", "chosen": " a b c d", "rejected": " e", "chosen_signal": [1, 2, 3, 4, 5], "chosen_cuts": [1, 3]}"#;
    let whole = tokenize_pairs(&data(line), &with_bos, None, &TokenizeOptions::default()).unwrap();
    let full = &whole.items[0];
    assert_eq!(full.chosen.len(), 5);
    let cut = tokenize_pairs(
        &data(line),
        &with_bos,
        None,
        &limits(Limits {
            max_prompt_tokens: Some(3),
            max_response_tokens: Some(2),
            max_total_tokens: None,
        }),
    )
    .unwrap();
    let pair = &cut.items[0];
    assert_eq!(
        pair.prompt,
        [&[1], &full.prompt[full.prompt.len() - 2..]].concat()
    );
    assert_eq!(pair.chosen, full.chosen[..2], "a cut response has no EOS");
    assert_eq!(pair.rejected, full.rejected);
    assert_eq!((cut.truncated_prompts, cut.truncated_responses), (1, 1));
    assert_eq!(cut.external[0][0].signal.as_deref(), Some(&[1.0, 2.0][..]));
    assert_eq!(cut.external[0][0].cuts.as_deref(), Some(&[1][..]));
    assert_eq!(cut.external[0][1].signal, None);
}

#[test]
fn detail_05_rows_without_a_response_token_left_are_dropped_and_counted() {
    let tokenizer = tokenizer("smollm", false);
    let long = r#"{"prompt": "one two three four five six", "chosen": " a", "rejected": " b"}"#;
    let short = r#"{"prompt": "p", "chosen": " a", "rejected": " b"}"#;
    let tight = limits(Limits {
        max_total_tokens: Some(4),
        ..Limits::default()
    });
    let done =
        tokenize_pairs(&data(&format!("{long}\n{short}")), &tokenizer, None, &tight).unwrap();
    assert_eq!(
        (done.items.len(), done.items[0].id, done.dropped),
        (1, 2, 1)
    );
    let all = tokenize_pairs(&data(long), &tokenizer, None, &tight).unwrap_err();
    insta::assert_snapshot!(all, @r#"
`data.jsonl`: all 1 rows were dropped, the length limits leave no response token; raise the limit on the total length or lower the one on the prompt
"#);
    let zero = limits(Limits {
        max_response_tokens: Some(0),
        ..Limits::default()
    });
    let error = tokenize_pairs(&data(short), &tokenizer, None, &zero).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`max_response_tokens` is 0, expected at least 1"
    );
}

#[test]
fn in_a_conversation_only_the_assistants_words_count() {
    let tokenizer = tokenizer("smollm", false);
    let line = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}, {"role": "user", "content": "late"}]}"#;
    let template = smollm_template();
    let done = tokenize_responses(
        &data(line),
        &tokenizer,
        Some(&template),
        &TokenizeOptions::default(),
    )
    .unwrap();
    let one = &done.items[0];
    let counted: Vec<u32> = one
        .response
        .iter()
        .zip(&one.response_mask)
        .filter(|(_, own)| **own)
        .map(|(id, _)| *id)
        .collect();
    assert_eq!(
        tokenizer.decode(&counted).unwrap(),
        "Hello<|im_end|>See you<|im_end|>"
    );
    assert!(
        tokenizer
            .decode(&one.prompt)
            .unwrap()
            .ends_with("<|im_start|>assistant\n")
    );
    assert_eq!(
        tokenizer.decode(&one.response).unwrap(),
        "Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you<|im_end|>"
    );
    assert_eq!(one.response.len(), one.response_mask.len());
    // A limit that leaves only the user's words drops the row; one that leaves some of the first answer does not.
    let text = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}"#;
    let kept = limits(Limits {
        max_response_tokens: Some(1),
        ..Limits::default()
    });
    let done = tokenize_responses(&data(text), &tokenizer, Some(&template), &kept).unwrap();
    assert_eq!(done.items[0].response_mask, [true]);
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused() {
    let tokenizer = tokenizer("smollm", false);
    let forgetful = template(
        "{% for m in messages %}{% if not (m.role == 'assistant' and not loop.last) %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    );
    let line = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}]}"#;
    let error = tokenize_responses(
        &data(line),
        &tokenizer,
        Some(&forgetful),
        &TokenizeOptions::default(),
    )
    .unwrap_err();
    insta::assert_snapshot!(error, @r#"
`data.jsonl`, row 1: column `messages`: chat template `test` renders the conversation before message 1 differently when that message follows (they part at byte 12)
"#);
}

#[test]
fn plain_text_is_all_response_after_its_first_token() {
    let line = r#"{"text": "the quick brown fox"}"#;
    for add_bos in [false, true] {
        let tokenizer = tokenizer("smollm", add_bos);
        let ids = tokenizer.encode("the quick brown fox").unwrap();
        let done =
            tokenize_responses(&data(line), &tokenizer, None, &TokenizeOptions::default()).unwrap();
        let one = &done.items[0];
        let joint = [one.prompt.as_slice(), &one.response].concat();
        let bos: &[u32] = if add_bos { &[1] } else { &[] };
        assert_eq!(joint, [bos, &ids, &[2]].concat());
        assert_eq!(one.prompt.len(), 1);
        assert!(one.response_mask.iter().all(|&own| own));
    }
}

#[test]
fn the_repositorys_fixtures_tokenise() {
    let tokenizer = tokenizer("smollm", false);
    let template = smollm_template();
    let options = TokenizeOptions::default();
    let read = |name: &str| {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../fixtures")
            .join(name);
        DataSet::read(&path, ReadOptions::default()).unwrap()
    };
    let text = tokenize_pairs(&read("preferences.jsonl"), &tokenizer, None, &options).unwrap();
    let chat = tokenize_pairs(
        &read("preferences_chat.jsonl"),
        &tokenizer,
        Some(&template),
        &options,
    )
    .unwrap();
    assert_eq!((text.items.len(), chat.items.len()), (48, 40));
    for pair in text.items.iter().chain(&chat.items) {
        for response in [&pair.chosen, &pair.rejected] {
            assert_eq!(response.iter().filter(|&&id| id == 2).count(), 1);
            assert_eq!(response.last(), Some(&2));
        }
        assert_ne!(pair.chosen, pair.rejected);
    }
    let sft =
        tokenize_responses(&read("sft.jsonl"), &tokenizer, Some(&template), &options).unwrap();
    assert_eq!(sft.items.len(), 30);
    assert!(
        sft.items
            .iter()
            .any(|one| one.response_mask.contains(&false))
    );
    let prompts = tokenize_prompts(&read("prompts.jsonl"), &tokenizer, None, &options).unwrap();
    assert_eq!(prompts.items.len(), 24);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn detail_01_any_pair_keeps_the_prefix_law_or_is_refused(prompt in "\\PC{1,20}", chosen in "\\PC{1,20}", rejected in "\\PC{1,20}") {
        thread_local! {
            static TOKENIZER: Tokenizer = tokenizer("smollm", false);
        }
        TOKENIZER.with(|tokenizer| {
            let line = serde_json::json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}).to_string();
            let Ok(data) = DataSet::from_jsonl("x", &line) else { return Ok(()) };
            if let Ok(done) = tokenize_pairs(&data, tokenizer, None, &TokenizeOptions::default()) {
                let pair = &done.items[0];
                prop_assert_eq!(&pair.prompt, &tokenizer.encode(&prompt).unwrap());
                for (text, ids) in [(&chosen, &pair.chosen), (&rejected, &pair.rejected)] {
                    let joint = tokenizer.encode(&format!("{prompt}{text}")).unwrap();
                    prop_assert_eq!([pair.prompt.as_slice(), ids].concat(), [joint.as_slice(), &[2]].concat());
                }
            }
            Ok(())
        })?;
    }
}
