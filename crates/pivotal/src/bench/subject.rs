//! What is measured on: a model and pairs from files, or random ones of stated sizes.

use std::collections::BTreeMap;

use burn::tensor::Device;
use pivotal_core::{TokenizedPair, random_stream};
use pivotal_credit::random_subset;
use pivotal_data::{DataSet, ReadOptions, tokenize_pairs};
use pivotal_model::{
    Checkpoint, Decoder, DecoderConfig, Family, HostTensor, RopeScaling, SpecialIds,
};
use pivotal_train::settings::{DataSettings, LoraSettings, ModelSettings, PrefixRule};
use pivotal_train::workspace::Workspace;
use rand::RngExt;

use crate::bench::{Keep, Settings};
use crate::failure::Failure;

/// As many pairs, of the mean lengths, as HumanEval's 164 prompts make with their own solution and another one's.
const PAIRS: usize = 164;
const PROMPT_TOKENS: usize = 140;
const CHOSEN_TOKENS: usize = 59;
const REJECTED_TOKENS: usize = 58;

/// A model and pairs, with their descriptions.
pub(crate) struct Subject {
    /// Frozen.
    pub(crate) base: Decoder,
    pub(crate) pairs: Vec<TokenizedPair>,
    pub(crate) model: String,
    pub(crate) data: String,
}

impl Subject {
    /// The base is packed where adapters are trained, as the recipes' is.
    pub(crate) fn load(settings: &Settings) -> Result<Self, Failure> {
        let lora = lora(settings.lora_rank);
        let Some(path) = &settings.model else {
            let base = random_decoder(smollm2_shape(), settings)?;
            let base = match lora.spec() {
                Some(_) => base.packed(),
                None => base,
            };
            let (pairs, data) = synthetic(base.config(), settings);
            let model = "random weights of SmolLM2-135M's shape".to_owned();
            return Ok(Self {
                base,
                pairs,
                model,
                data,
            });
        };
        let model = ModelSettings {
            path: path.clone(),
            precision: settings.precision,
            ..ModelSettings::default()
        };
        let workspace = Workspace::load_under(&model, &lora)?;
        let name = |path: &std::path::Path| {
            let name = path.file_name().unwrap_or(path.as_os_str());
            name.to_string_lossy().into_owned()
        };
        let base = workspace.decoder;
        let (pairs, data) = match &settings.data {
            None => synthetic(base.config(), settings),
            Some(data) => {
                let limits = DataSettings {
                    max_tokens: settings.max_tokens,
                    // Whatever file it is: a few tokens at the seam change no time.
                    prefix: PrefixRule::Parts,
                    ..DataSettings::default()
                };
                let options = limits.tokenize_options(base.config().vocab_size);
                let rows = DataSet::read(data, ReadOptions::default())?;
                let template = workspace.template.as_ref();
                let read = tokenize_pairs(&rows, &workspace.tokenizer, template, &options)?;
                let description = describe(&name(data), &read.items);
                (read.items, description)
            }
        };
        Ok(Self {
            base,
            pairs,
            model: name(path),
            data,
        })
    }

    /// What is trained: adapters of `rank` on every linear layer, or every parameter for 0.
    pub(crate) fn policy(&self, rank: usize) -> Result<Decoder, Failure> {
        match lora(rank).spec() {
            Some(spec) => Ok(self.base.clone().with_lora(&spec, 1)?),
            None => Ok(self.base.clone().trainable()),
        }
    }
}

/// Adapters of `rank` on every linear layer, or none for 0.
fn lora(rank: usize) -> LoraSettings {
    LoraSettings {
        rank,
        ..LoraSettings::default()
    }
}

/// Tokens of a segment of [`mask`].
const SEGMENT: usize = 10;

/// Flags of a response of `tokens` tokens cut into segments of [`SEGMENT`], of which random ones are kept, as many as `keep` says.
pub(crate) fn mask(keep: Keep, tokens: usize, pair: usize, side: usize) -> Vec<bool> {
    let mut stream = random_stream(pair as u64, &format!("bench keep {side}"));
    let segments = random_subset(tokens.div_ceil(SEGMENT), keep.fraction(), &mut stream);
    let flags = segments.iter().flat_map(|&keep| [keep; SEGMENT]);
    flags.take(tokens).collect()
}

/// Pairs of random token ids whose responses are `response` tokens long.
pub(crate) fn random_pairs(
    count: usize,
    prompt: usize,
    response: usize,
    vocab: usize,
) -> Vec<TokenizedPair> {
    pairs_of((0..count).map(|_| [prompt, response, response]), vocab)
}

/// SmolLM2-135M's sizes.
pub(crate) fn smollm2_shape() -> DecoderConfig {
    DecoderConfig {
        family: Family::Llama,
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 100_000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: true,
        qkv_bias: false,
        output_bias: false,
        max_positions: 8192,
        sliding_window: None,
        special_ids: SpecialIds::default(),
    }
}

/// Norms at 1, everything else uniform in ±0.04: activations stay of the size that trained weights give.
fn random_decoder(config: DecoderConfig, settings: &Settings) -> Result<Decoder, Failure> {
    let mut stream = random_stream(1, "bench weights");
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.tensors() {
        let count = shape.iter().product();
        let values = match shape.len() {
            1 => vec![1.0; count],
            _ => (0..count)
                .map(|_| stream.random_range(-0.04..0.04))
                .collect(),
        };
        tensors.insert(name, HostTensor::new(shape, values)?);
    }
    let checkpoint = Checkpoint {
        config,
        tensors,
        tokenizer: None,
        tokenizer_config: serde_json::Map::new(),
        chat_template: None,
    };
    let precision = settings.precision.into();
    Ok(Decoder::from_checkpoint(
        &checkpoint,
        &Device::flex(),
        precision,
    )?)
}

/// Pairs whose lengths spread evenly, half their mean to either side, and lie in mirrored twos, so that the mean is exact.
fn synthetic(config: &DecoderConfig, settings: &Settings) -> (Vec<TokenizedPair>, String) {
    let mut stream = random_stream(1, "bench lengths");
    let means = [PROMPT_TOKENS, CHOSEN_TOKENS, REJECTED_TOKENS];
    let limit = match settings.max_tokens {
        0 => config.max_positions,
        tokens => tokens.min(config.max_positions),
    };
    let mut mirrored = None;
    let lengths = (0..PAIRS).map(|_| {
        let [prompt, chosen, rejected] = mirrored.take().unwrap_or_else(|| {
            let first = means.map(|mean| stream.random_range(mean / 2..=mean + mean / 2));
            mirrored = Some([0, 1, 2].map(|part| 2 * means[part] - first[part]));
            first
        });
        // A short limit leaves prompt and response half of it each.
        let response = |tokens: usize| tokens.min(limit / 2).max(1);
        let (chosen, rejected) = (response(chosen), response(rejected));
        let room = limit.saturating_sub(chosen.max(rejected)).max(1);
        [prompt.min(room), chosen, rejected]
    });
    let pairs = pairs_of(lengths, config.vocab_size);
    let description = describe("random token ids", &pairs);
    (pairs, description)
}

fn pairs_of(lengths: impl Iterator<Item = [usize; 3]>, vocab: usize) -> Vec<TokenizedPair> {
    let mut stream = random_stream(1, "bench token ids");
    let mut ids = |count: usize| {
        let draw = |_| stream.random_range(0..vocab as u32);
        (0..count).map(draw).collect::<Vec<_>>()
    };
    let pair = |(index, [prompt, chosen, rejected]): (usize, [usize; 3])| TokenizedPair {
        id: index as u64 + 1,
        prompt: ids(prompt),
        chosen: ids(chosen),
        rejected: ids(rejected),
    };
    lengths.enumerate().map(pair).collect()
}

fn describe(name: &str, pairs: &[TokenizedPair]) -> String {
    let mean = |tokens: &dyn Fn(&TokenizedPair) -> usize| {
        let sum: usize = pairs.iter().map(tokens).sum();
        sum as f64 / pairs.len().max(1) as f64
    };
    format!(
        "{name}: {} pairs, mean tokens {:.0} prompt, {:.0} chosen, {:.0} rejected",
        pairs.len(),
        mean(&|pair| pair.prompt.len()),
        mean(&|pair| pair.chosen.len()),
        mean(&|pair| pair.rejected.len()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synthetic_pairs_have_the_stated_means_and_fit_the_limit() {
        let config = smollm2_shape();
        let (pairs, description) = synthetic(&config, &Settings::default());
        assert_eq!(
            description,
            "random token ids: 164 pairs, mean tokens 140 prompt, 59 chosen, 58 rejected"
        );
        assert!(pairs.iter().any(|pair| pair.prompt.len() != PROMPT_TOKENS));
        for max_tokens in [2, 64] {
            let settings = Settings {
                max_tokens,
                ..Settings::default()
            };
            let (pairs, _) = synthetic(&config, &settings);
            for pair in pairs {
                let response = pair.chosen.len().max(pair.rejected.len());
                assert!(pair.prompt.len() + response <= max_tokens && !pair.prompt.is_empty());
            }
        }
    }

    #[test]
    fn masks_keep_their_share() {
        assert_eq!(mask(Keep::All, 7, 0, 0), [true; 7]);
        let half = mask(Keep::Fraction(0.5), 100, 3, 1);
        assert_eq!(half.iter().filter(|&&keep| keep).count(), 50);
        assert_eq!(half, mask(Keep::Fraction(0.5), 100, 3, 1));
        assert_ne!(half, mask(Keep::Fraction(0.5), 100, 3, 0));
        assert!(
            half.chunks(SEGMENT)
                .all(|segment| segment == [segment[0]; SEGMENT])
        );
    }
}
