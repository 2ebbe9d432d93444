//! The laws of sampling many responses: places refilled, stop strings, log-probabilities at a temperature.

use std::collections::BTreeMap;

use crate::reference::{decoder, floats, golden, sequence};
use pivotal_model::{
    Finish, GenerateSettings, Generation, Generator, Request, Sampling, StopStrings,
};
use pivotal_ops::Precision;

/// Two f32 softmaxes of logits that agree to 1e-4, over a temperature of 0.7.
const LOGPS: f64 = 3e-4;

const PROMPTS: [&[u32]; 5] = [&[1, 40, 50], &[1], &[8, 9], &[1, 40, 50], &[60, 61, 62, 63]];

fn generator() -> Generator {
    Generator::new(&decoder(&golden("qwen2"), Precision::F32), Precision::F32)
}

fn settings() -> GenerateSettings {
    GenerateSettings {
        sampling: Sampling {
            temperature: 3.0,
            ..Sampling::default()
        },
        samples: 3,
        max_tokens: 12,
        eos: vec![2, 3, 50],
        batch: 4,
        seed: 5,
    }
}

fn requests() -> Vec<Request<'static>> {
    let prompts = PROMPTS.iter().enumerate();
    prompts
        .map(|(id, prompt)| Request {
            id: 70 + id as u64,
            prompt,
        })
        .collect()
}

/// Every response by its request's id and its sample; panics if one comes twice.
fn sampled(
    generator: &Generator,
    requests: &[Request<'_>],
    settings: &GenerateSettings,
    stop: Option<StopStrings<'_>>,
) -> BTreeMap<(u64, usize), Generation> {
    let mut found = BTreeMap::new();
    let stats = generator
        .sample_many(requests, settings, stop, &mut |mut generation| {
            let id = requests[generation.prompt].id;
            generation.prompt = 0;
            let before = found.insert((id, generation.sample), generation);
            assert!(before.is_none(), "a response came twice");
        })
        .unwrap();
    assert_eq!(found.len(), requests.len() * settings.samples);
    assert_eq!(
        stats.tokens,
        found.values().map(|g| g.token_ids.len()).sum::<usize>()
    );
    assert_eq!(
        stats.prompt_tokens,
        requests.iter().map(|r| r.prompt.len()).sum::<usize>()
    );
    assert!(stats.most_live <= settings.batch, "{stats:?}");
    found
}

#[test]
fn neither_the_order_nor_the_places_nor_the_company_change_a_response() {
    let generator = generator();
    let (requests, settings) = (requests(), settings());
    let expected = sampled(&generator, &requests, &settings, None);
    let eos = |g: &&Generation| g.finish == Finish::Eos;
    let ended = expected.values().filter(eos).count();
    assert!((2..14).contains(&ended), "{ended} of 15 ended early");
    let backwards: Vec<_> = requests.iter().rev().copied().collect();
    for batch in [1, 2, 7, 100] {
        let settings = GenerateSettings {
            batch,
            ..settings.clone()
        };
        for requests in [&requests, &backwards] {
            assert_eq!(sampled(&generator, requests, &settings, None), expected);
        }
    }
    for request in &requests {
        for (key, alone) in sampled(&generator, &[*request], &settings, None) {
            assert_eq!(alone, expected[&key]);
        }
    }
    // Equal prompts differ by their ids alone.
    assert_ne!(expected[&(70, 0)].token_ids, expected[&(73, 0)].token_ids);
}

/// Responses of unequal lengths end in the order in which places that are refilled at once would end them.
#[test]
fn a_place_is_refilled_as_soon_as_it_is_free() {
    let generator = generator();
    let (requests, mut order) = (requests(), Vec::new());
    let settings = settings();
    let stats = generator
        .sample_many(&requests, &settings, None, &mut |generation| {
            order.push((
                generation.prompt * 3 + generation.sample,
                generation.token_ids.len(),
            ));
        })
        .unwrap();
    assert_eq!(stats.most_live, settings.batch);
    // Simulated: each place takes the next response when its own has ended.
    let lengths: BTreeMap<usize, usize> = order.iter().copied().collect();
    let mut places = vec![0; settings.batch];
    let mut ends: Vec<(usize, usize)> = Vec::new();
    for (&index, &length) in &lengths {
        let place = (0..places.len())
            .min_by_key(|&place| places[place])
            .unwrap();
        places[place] += length.saturating_sub(1);
        ends.push((places[place], index));
    }
    let found: Vec<usize> = order.iter().map(|&(index, _)| index).collect();
    let step = |index: usize| ends.iter().find(|end| end.1 == index).unwrap().0;
    assert!(
        found.windows(2).all(|pair| step(pair[0]) <= step(pair[1])),
        "{found:?} against {ends:?}"
    );
}

/// Two letters a token, so that strings lie across tokens and begin inside them.
fn letters(ids: &[u32]) -> String {
    let letter = |n: u32| char::from(b'a' + (n % 26) as u8);
    ids.iter()
        .flat_map(|&id| [letter(id), letter(id / 3 + 7)])
        .collect()
}

#[test]
fn a_stop_string_ends_a_response_wherever_it_lies() {
    let generator = generator();
    let (requests, settings) = (requests(), settings());
    let free = sampled(&generator, &requests, &settings, None);
    let mut met = 0;
    for (key, whole) in free.iter().filter(|(_, g)| g.token_ids.len() >= 6) {
        let text = letters(&whole.token_ids);
        for (start, end) in [(3, 6), (4, 6), (5, 6), (1, 4), (2, 9)] {
            let strings = [text[start..end].to_owned(), String::new(), "!".to_owned()];
            let stop = StopStrings {
                strings: &strings,
                text: &letters,
            };
            let stopped = &sampled(&generator, &requests, &settings, Some(stop))[key];
            let at = text.find(&strings[0]).unwrap();
            let tokens = (at + strings[0].len()).div_ceil(2);
            assert_eq!(stopped.token_ids, whole.token_ids[..tokens]);
            assert_eq!(stopped.token_logps, whole.token_logps[..tokens]);
            assert_eq!(stopped.text.as_deref(), Some(&text[..at]));
            // The token that ends the response may also complete the string.
            let eos = settings.eos.contains(&stopped.token_ids[tokens - 1]);
            let expected = if eos { Finish::Eos } else { Finish::Stop };
            assert_eq!(stopped.finish, expected);
            met += 1;
        }
    }
    assert!(met > 10, "{met}");
    let strings = ["!".to_owned()];
    let stop = StopStrings {
        strings: &strings,
        text: &letters,
    };
    for (key, with) in sampled(&generator, &requests, &settings, Some(stop)) {
        let whole = &free[&key];
        assert_eq!(with.text, Some(letters(&whole.token_ids)));
        assert_eq!(
            (with.token_ids, with.finish),
            (whole.token_ids.clone(), whole.finish)
        );
    }
}

/// Teacher-forced logits over the temperature, normalised over every token, whatever the filters.
#[test]
fn tempered_log_probabilities_are_those_of_a_forward_pass_at_that_temperature() {
    let decoder = decoder(&golden("qwen2"), Precision::F32);
    let generator = Generator::new(&decoder, Precision::F32);
    let vocab = decoder.config().vocab_size;
    for (temperature, top_k) in [
        (0.7, None),
        (0.7, Some(5)),
        (2.0, Some(40)),
        (1.0, Some(5)),
        (0.0, None),
    ] {
        let sampling = Sampling {
            temperature,
            top_k,
            ..Sampling::default()
        };
        let settings = GenerateSettings {
            sampling,
            ..settings()
        };
        for generation in generator.generate(&PROMPTS, &settings).unwrap() {
            let prompt = PROMPTS[generation.prompt];
            let whole = [prompt, &generation.token_ids].concat();
            let hidden = decoder.hidden(&sequence(&whole)).unwrap();
            let sources: Vec<usize> = (prompt.len() - 1..whole.len() - 1).collect();
            let logits = floats(decoder.logits(&hidden, &sources));
            for (at, logits) in logits.chunks(vocab).enumerate() {
                let divisor = if temperature == 0.0 { 1.0 } else { temperature };
                let scaled: Vec<f64> = logits.iter().map(|&x| f64::from(x) / divisor).collect();
                let normaliser = scaled.iter().map(|x| x.exp()).sum::<f64>().ln();
                let expected = scaled[generation.token_ids[at] as usize] - normaliser;
                let off = (f64::from(generation.tempered_logps[at]) - expected).abs();
                assert!(off <= LOGPS, "{sampling:?}: token {at} is off by {off:e}");
            }
            if temperature == 1.0 || temperature == 0.0 {
                assert_eq!(generation.tempered_logps, generation.token_logps);
            }
            if top_k.is_none() && temperature > 0.0 {
                assert_eq!(generation.tempered_logps, generation.sampling_logps);
            }
        }
    }
}
