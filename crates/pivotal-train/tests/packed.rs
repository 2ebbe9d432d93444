//! Weights of which only bf16 panels are kept, against kept ones: the same scores, gradients and hashes.

use std::panic::AssertUnwindSafe;
use std::path::Path;

use burn::tensor::Device;
use pivotal_core::{TokenizedPair, TokenizedResponse};
use pivotal_model::{Checkpoint, Decoder, LoraSpec, Parameter, Parameters, load};
use pivotal_ops::Precision;
use pivotal_train::score::{Group, token_logps};
use pivotal_train::settings::{self, OptimizerSettings};
use pivotal_train::sft;
use pivotal_train::workspace::Workspace;

/// A head tied to the embedding, one of its own, and biases.
const FAMILIES: [&str; 3] = ["llama", "llama3", "qwen2"];

fn checkpoint(family: &str) -> Checkpoint {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden");
    load(&path.join(family)).unwrap()
}

fn decoder(family: &str, precision: Precision) -> Decoder {
    Decoder::from_checkpoint(&checkpoint(family), &Device::flex(), precision).unwrap()
}

/// An adapter on `targets`, its `B` not zero.
fn adapted(base: Decoder, targets: &[&str]) -> Decoder {
    let spec = LoraSpec {
        rank: 4,
        alpha: 8.0,
        targets: targets.iter().map(ToString::to_string).collect(),
    };
    let mut policy = base.with_lora(&spec, 7).unwrap();
    policy.visit_parameters(&mut |name, parameter| {
        if name.ends_with("lora_B.weight") {
            let mut value = parameter.to_host();
            let places = value.values_mut().iter_mut().enumerate();
            places.for_each(|(place, value)| *value = (place % 11) as f32 / 400.0 - 0.0125);
            parameter.assign(name, &value).unwrap();
        }
    });
    policy
}

fn packed_weights(decoder: &Decoder) -> usize {
    let mut packed = 0;
    decoder.clone().visit_parameters(&mut |_, parameter| {
        packed += usize::from(matches!(parameter, Parameter::Packed(_)));
    });
    packed
}

fn responses() -> Vec<TokenizedResponse> {
    let ids = |start: u32, count: u32| {
        let id = |place: u32| 3 + (start * 31 + place * 17) % 60;
        (0..count).map(id).collect::<Vec<u32>>()
    };
    [(5, 40), (1, 70), (9, 4)]
        .into_iter()
        .enumerate()
        .map(|(id, (prompt, response))| TokenizedResponse {
            id: id as u64 + 1,
            prompt: ids(id as u32, prompt),
            response: ids(id as u32 + 10, response),
            response_mask: vec![true; response as usize],
        })
        .collect()
}

#[test]
fn gradients_are_those_of_kept_weights_bit_for_bit() {
    let items = responses();
    let items: Vec<&TokenizedResponse> = items.iter().collect();
    for family in FAMILIES {
        for targets in [&[][..], &["v_proj", "down_proj"]] {
            let kept = decoder(family, Precision::Bf16);
            let packed = kept.clone().packed();
            let gradients = |base: Decoder| {
                let mut policy = adapted(base, targets);
                let settings = OptimizerSettings::default();
                let (sum, metrics) = sft::gradients(&mut policy, &items, &settings, 1).unwrap();
                (sum.to_host(), metrics.loss.to_bits())
            };
            let (kept, packed) = (gradients(kept), gradients(packed));
            assert!(!kept.0.is_empty(), "{family}: nothing to compare");
            assert_eq!(kept, packed, "{family} {targets:?}");
        }
    }
}

#[test]
fn scores_and_hashes_are_those_of_kept_weights() {
    let pair = TokenizedPair {
        id: 1,
        prompt: vec![3, 17, 40],
        chosen: vec![5, 6, 7, 8],
        rejected: vec![9, 10],
    };
    for family in FAMILIES {
        let kept = adapted(decoder(family, Precision::Bf16), &[]);
        let packed = kept.clone().packed();
        let layers = kept.config().layers;
        let expected = match pivotal_kernels::bf16_available() {
            true => 7 * layers,
            false => 0,
        };
        assert_eq!(packed_weights(&packed), expected);
        assert_eq!(packed_weights(&packed.base().detached()), expected);
        let groups = [Group::of_pair(&pair)];
        let scores = |decoder: &Decoder| token_logps(decoder, &groups, 4096).unwrap();
        assert_eq!(scores(&kept), scores(&packed), "{family}");
        let hash = |decoder| Workspace::decoder_hash(decoder, settings::Precision::Bf16);
        assert_eq!(hash(&kept), hash(&packed), "{family}");
        assert_ne!(hash(&kept), hash(&kept.base()), "{family}");
    }
}

#[test]
fn what_is_trained_or_multiplied_in_f32_stays_whole() {
    let whole = decoder("llama", Precision::F32).packed();
    assert_eq!(packed_weights(&whole), 0);
    let trained = decoder("llama", Precision::Bf16).trainable().packed();
    assert_eq!(packed_weights(&trained), 0);
}

#[test]
fn packed_as_it_is_read_is_packed_afterwards() {
    for family in FAMILIES {
        for precision in [Precision::Bf16, Precision::F32] {
            let mut checkpoint = checkpoint(family);
            let device = Device::flex();
            let read = Decoder::take_packed_from(&mut checkpoint, &device, precision).unwrap();
            assert!(checkpoint.tensors.is_empty(), "{family}");
            let packed = decoder(family, precision).packed();
            assert_eq!(packed_weights(&read), packed_weights(&packed), "{family}");
            let hash = |decoder| Workspace::decoder_hash(decoder, settings::Precision::Bf16);
            assert_eq!(hash(&read), hash(&packed), "{family}");
            let logps = |decoder: &Decoder| {
                let group = Group {
                    prompt: &[5, 9],
                    responses: vec![&[7, 8, 3, 20, 4]],
                };
                token_logps(decoder, &[group], 64).unwrap()
            };
            assert_eq!(logps(&read), logps(&packed), "{family}");
        }
    }
}

#[test]
fn a_packed_decoder_with_its_adapter_merged_is_whole_again() {
    let policy = adapted(decoder("llama", Precision::Bf16).packed(), &[]);
    let merged = policy.merged();
    assert_eq!(packed_weights(&merged), 0);
    let mut far = 0.0f32;
    let expected = adapted(decoder("llama", Precision::Bf16), &[]).merged();
    let mut values = Vec::new();
    expected
        .clone()
        .visit_parameters(&mut |_, parameter| values.push(parameter.to_host()));
    let mut values = values.iter();
    merged.clone().visit_parameters(&mut |_, parameter| {
        let expected = values.next().unwrap();
        let largest = expected.values().iter().fold(0.0f32, |a, b| a.max(b.abs()));
        for (a, b) in parameter.to_host().values().iter().zip(expected.values()) {
            far = far.max((a - b).abs() / largest);
        }
    });
    // A weight is rounded once, to 8 bits.
    assert!(far <= 1.0 / 256.0, "{far}");
}

#[test]
fn a_packed_decoder_cannot_be_trained_whole() {
    let packed = decoder("llama", Precision::Bf16).packed();
    let is_packed = packed_weights(&packed) > 0;
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| packed.trainable()));
    assert_eq!(outcome.is_err(), is_packed);
}
