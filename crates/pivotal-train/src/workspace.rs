//! A model with its tokenizer and chat template, as recipes load them and write them back.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use pivotal_core::{ContentHasher, FileHash, TokenizedPair, TokenizerSource, content_hash};
use pivotal_data::{ChatTemplate, SpecialTokens, Tokenizer};
use pivotal_model::{
    AdapterTask, Checkpoint, Decoder, DecoderConfig, HostTensor, LoraAdapter, Parameters,
    RewardModel, load, save,
};
use pivotal_ops::DeviceName;

use crate::error::{Error, Result};
use crate::settings::{LoraSettings, ModelSettings, Precision};

/// A loaded model, and what its text needs.
pub struct Workspace {
    /// The checkpoint without its weights, which [`Workspace::decoder`] has; a value head stays.
    pub checkpoint: Checkpoint,
    /// The decoder, frozen, with the adapter that the settings name, if any.
    pub decoder: Decoder,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, where the checkpoint has one.
    pub template: Option<ChatTemplate>,
    /// Where the checkpoint lies.
    pub path: PathBuf,
    /// Of the adapter, or else of the checkpoint.
    value_head: Option<HostTensor>,
}

/// What a model is loaded as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Its log-probabilities are read: a reward model's were trained for something else, and are refused.
    Policy,
    /// What a reward model is made of, which may be one already.
    RewardModel,
}

impl Workspace {
    /// Loads the model, its adapter, its tokenizer and its template.
    ///
    /// # Errors
    /// [`Error::Setting`] without a path, or for a reward model; otherwise whatever is wrong with the files.
    pub fn load(settings: &ModelSettings) -> Result<Self> {
        Self::load_by(settings, Decoder::take_from, Role::Policy)
    }

    /// The same, with the decoder [`Decoder::packed`] as it is read: for what does not train its weights.
    ///
    /// # Errors
    /// As [`Workspace::load`].
    pub fn load_packed(settings: &ModelSettings) -> Result<Self> {
        Self::load_by(settings, Decoder::take_packed_from, Role::Policy)
    }

    /// [`Workspace::load_packed`] where an adapter is trained, by [`Workspace::trainable`] with these settings.
    ///
    /// # Errors
    /// As [`LoraSettings::check`] and [`Workspace::load`].
    pub fn load_under(settings: &ModelSettings, lora: &LoraSettings) -> Result<Self> {
        lora.check()?;
        match lora.spec() {
            Some(_) => Self::load_packed(settings),
            None => Self::load(settings),
        }
    }

    /// [`Workspace::load_under`] where a reward model is trained: the model may be one, and its head is
    /// [`Workspace::value_head`].
    ///
    /// # Errors
    /// As [`Workspace::load`], but that a reward model is taken.
    pub fn load_reward_model_under(settings: &ModelSettings, lora: &LoraSettings) -> Result<Self> {
        match lora.spec() {
            Some(_) => Self::load_below_reward_model(settings),
            None => Self::load_by(settings, Decoder::take_from, Role::RewardModel),
        }
    }

    /// [`Workspace::load_packed`] of what a reward model's adapter may lie on, another reward model included.
    ///
    /// # Errors
    /// As [`Workspace::load_reward_model_under`].
    pub fn load_below_reward_model(settings: &ModelSettings) -> Result<Self> {
        Self::load_by(settings, Decoder::take_packed_from, Role::RewardModel)
    }

    fn load_by(settings: &ModelSettings, take: TakeDecoder, role: Role) -> Result<Self> {
        if settings.path.as_os_str().is_empty() {
            let expected = "a Hugging Face directory, a .gguf file or a run directory";
            return Err(Error::Setting {
                key: "model",
                found: "empty".into(),
                expected,
            });
        }
        let path = model_path(&settings.path);
        let holds_adapter = path.join("adapter").join("adapter_config.json").is_file();
        if holds_adapter && !path.join("config.json").is_file() {
            return Err(Error::Setting {
                key: "model",
                found: path.display().to_string(),
                expected: "a model; this run holds an adapter: give `--model BASE --adapter RUN`",
            });
        }
        let device = DeviceName::from(settings.device).open()?;
        let mut checkpoint = load(&path)?;
        if role == Role::Policy && checkpoint.value_head().is_some() {
            return Err(not_a_policy("model", &path));
        }
        let tokenizer = tokenizer(&checkpoint, &path)?;
        let text = |id: Option<u32>| id.map(|id| tokenizer.token_text(id)).transpose();
        let (bos, eos) = (text(tokenizer.bos())?, text(Some(tokenizer.eos()))?);
        let template = checkpoint.chat_template.as_deref().map(|source| {
            ChatTemplate::new("chat_template", source, bos.as_deref(), eos.as_deref())
        });
        let template = template.transpose()?;
        let mut decoder = take(&mut checkpoint, &device, settings.precision.into())?;
        let mut value_head = checkpoint.value_head().cloned();
        if !settings.adapter.as_os_str().is_empty() {
            let adapter = LoraAdapter::load(&adapter_path(&settings.adapter))?;
            if role == Role::Policy && is_of_reward_model(&adapter) {
                return Err(not_a_policy("adapter", &settings.adapter));
            }
            decoder = decoder.with_adapter(&adapter)?;
            value_head = adapter.value_head.or(value_head);
        }
        Ok(Self {
            checkpoint,
            decoder,
            tokenizer,
            template,
            path,
            value_head,
        })
    }

    /// The value head that the adapter brought, or else the checkpoint, `[1, hidden]`.
    pub fn value_head(&self) -> Option<&HostTensor> {
        self.value_head.as_ref()
    }

    /// The decoder, trainable: with a fresh adapter, with the adapter it has, or with every parameter.
    ///
    /// # Errors
    /// If an adapter is asked for that does not fit.
    pub fn trainable(&mut self, lora: &LoraSettings, seed: u64) -> Result<Decoder> {
        if self.decoder.has_adapter() {
            // Its rank and scale are its own; a configuration that says otherwise would be untrue of the run.
            return match *lora == LoraSettings::default() {
                true => Ok(self.decoder.clone()),
                false => Err(Error::Setting {
                    key: "lora-rank, lora-alpha or lora-targets",
                    found: "given beside `--adapter`".into(),
                    expected: "the adapter's own: leave them out",
                }),
            };
        }
        match lora.spec() {
            Some(spec) => Ok(self.decoder.clone().with_lora(&spec, seed)?),
            None => Ok(self.decoder.clone().trainable()),
        }
    }

    /// Writes a trained policy: `adapter/` in peft's format if it has an adapter, else `model/`. Returns the path.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn write_policy(&self, policy: &mut Decoder, run: &Path) -> Result<PathBuf> {
        match policy.adapter(self.base_name()) {
            Some(adapter) => {
                let path = run.join("adapter");
                adapter.save(&path)?;
                Ok(path)
            }
            None => self.write_model(run, |checkpoint| policy.store(checkpoint)),
        }
    }

    /// Writes a reward model: as [`Workspace::write_policy`], with its value head as `score.weight`.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn write_reward_model(&self, model: &mut RewardModel, run: &Path) -> Result<PathBuf> {
        match model.decoder.adapter(self.base_name()) {
            Some(mut adapter) => {
                adapter.task = AdapterTask::SequenceClassification;
                adapter.value_head = Some(model.head());
                let path = run.join("adapter");
                adapter.save(&path)?;
                Ok(path)
            }
            None => self.write_model(run, |checkpoint| model.store(checkpoint)),
        }
    }

    fn write_model(&self, run: &Path, store: impl FnOnce(&mut Checkpoint)) -> Result<PathBuf> {
        let mut checkpoint = self.checkpoint.clone();
        checkpoint.tokenizer = Some(TokenizerSource::Json(self.tokenizer.to_json().to_vec()));
        store(&mut checkpoint);
        let path = run.join("model");
        save(&checkpoint, &path)?;
        Ok(path)
    }

    fn base_name(&self) -> Option<String> {
        Some(self.path.display().to_string())
    }

    /// Checks that the rows of `path` fit the model; `rows` are their numbers and their tokens.
    ///
    /// # Errors
    /// [`Error::Record`], naming the first that does not.
    pub fn check_rows(
        &self,
        path: &Path,
        rows: impl IntoIterator<Item = (u64, usize)>,
    ) -> Result<()> {
        for (row, tokens) in rows {
            let fits = self.decoder.config().check_length(tokens);
            fits.map_err(|error| Error::Record {
                path: path.into(),
                line: row as usize,
                what: format!("{error}: `--max-tokens` and `--max-prompt-tokens` shorten rows"),
            })?;
        }
        Ok(())
    }

    /// [`Workspace::check_rows`] of preferences, each with its longer response.
    ///
    /// # Errors
    /// As there.
    pub fn check_pairs(&self, path: &Path, pairs: &[TokenizedPair]) -> Result<()> {
        let rows = pairs.iter().map(|pair| {
            let response = pair.chosen.len().max(pair.rejected.len());
            (pair.id, pair.prompt.len() + response)
        });
        self.check_rows(path, rows)
    }

    /// A reward model on this model's tokenizer, off the tape and packed: the run, adapter or model directory of `pivotal reward`
    /// that the setting `key` names.
    ///
    /// # Errors
    /// [`Error::Setting`] if the directory has no value head, or a model of another tokenizer.
    pub fn reward_model(
        &self,
        key: &'static str,
        path: &Path,
        precision: Precision,
    ) -> Result<RewardModel> {
        let missing = || Error::Setting {
            key,
            found: path.display().to_string(),
            expected: "a directory with a value head (`score.weight`), as `pivotal reward` writes it",
        };
        if let Some(adapter) = adapter_of(path) {
            let adapter = LoraAdapter::load(&adapter)?;
            let head = adapter.value_head.as_ref().ok_or_else(missing)?;
            let decoder = self.decoder.base().with_adapter(&adapter)?.packed();
            return Ok(RewardModel::with_head(decoder, head)?.detached());
        }
        let mut checkpoint = load(&model_path(path))?;
        self.expect_tokenizer(key, path, &checkpoint)?;
        let decoder = self.packed_decoder(&mut checkpoint, precision)?;
        let head = checkpoint.value_head().ok_or_else(missing)?;
        Ok(RewardModel::with_head(decoder, head)?.detached())
    }

    /// Another policy on this model's tokenizer, off the tape: a run, adapter or model directory, or a GGUF file.
    ///
    /// # Errors
    /// [`Error::Setting`] if it is a reward model, or a model of another tokenizer.
    pub fn other_policy(&self, path: &Path, precision: Precision) -> Result<Decoder> {
        if let Some(adapter) = adapter_of(path) {
            let adapter = LoraAdapter::load(&adapter)?;
            if is_of_reward_model(&adapter) {
                return Err(not_a_policy("oracle", path));
            }
            return Ok(self.decoder.base().with_adapter(&adapter)?.detached());
        }
        let mut checkpoint = load(&model_path(path))?;
        if checkpoint.value_head().is_some() {
            return Err(not_a_policy("oracle", path));
        }
        self.expect_tokenizer("oracle", path, &checkpoint)?;
        self.packed_decoder(&mut checkpoint, precision)
    }

    /// The decoder of another model, on this one's device.
    fn packed_decoder(&self, checkpoint: &mut Checkpoint, precision: Precision) -> Result<Decoder> {
        let device = self.decoder.device();
        Ok(Decoder::take_packed_from(
            checkpoint,
            device,
            precision.into(),
        )?)
    }

    /// Its signal is read token by token: ids must mean the same to both models.
    fn expect_tokenizer(
        &self,
        key: &'static str,
        path: &Path,
        checkpoint: &Checkpoint,
    ) -> Result<()> {
        let ours = self.decoder.config().vocab_size;
        let same = match &checkpoint.tokenizer {
            // A model without one says nothing of its ids but how many they are.
            None => checkpoint.config.vocab_size == ours,
            Some(_) => {
                let theirs = tokenizer(checkpoint, &model_path(path))?;
                let text = |tokenizer: &Tokenizer, id| tokenizer.token_text(id).ok();
                let ids = 0..ours.max(checkpoint.config.vocab_size) as u32;
                ids.into_iter()
                    .all(|id| text(&theirs, id) == text(&self.tokenizer, id))
            }
        };
        match same {
            true => Ok(()),
            false => Err(Error::Setting {
                key,
                found: path.display().to_string(),
                expected: "a model with the tokenizer of `--model`: its numbers are read token by token",
            }),
        }
    }

    /// A hash of everything that decides a log-probability besides the tokens: weights, adapter, precision, card.
    pub fn decoder_hash(decoder: &Decoder, precision: Precision) -> String {
        let card = pivotal_ops::card(decoder.device());
        weights_hash(&mut decoder.clone(), decoder.config(), precision, card)
    }

    /// The same of a reward model's values.
    pub fn reward_model_hash(model: &RewardModel, precision: Precision) -> String {
        let card = pivotal_ops::card(model.decoder.device());
        weights_hash(&mut model.clone(), model.decoder.config(), precision, card)
    }

    /// The value head as an input of a run, where there is one: its reward model starts from it.
    pub fn head_hash(&self) -> Option<FileHash> {
        let head = self.value_head.as_ref()?;
        let bytes = head.values().iter().flat_map(|value| value.to_le_bytes());
        Some(FileHash {
            path: format!("the value head on {}", self.path.display()),
            blake3: content_hash(&bytes.collect::<Vec<u8>>()),
        })
    }

    /// The starting weights as an input of a run, by the path of the model: a run that is resumed on others is another run.
    pub fn weights(&self, precision: Precision) -> FileHash {
        FileHash {
            path: self.path.display().to_string(),
            blake3: weights_hash(
                &mut self.decoder.clone(),
                self.decoder.config(),
                precision,
                None,
            ),
        }
    }
}

fn weights_hash(
    model: &mut impl Parameters,
    config: &DecoderConfig,
    precision: Precision,
    card: Option<String>,
) -> String {
    let mut hasher = ContentHasher::default();
    hasher.update(format!("{precision:?} {config:?}{}\n", card.unwrap_or_default()).as_bytes());
    model.visit_parameters(&mut |name, parameter| {
        let (shape, digest) = (parameter.shape(), parameter.digest());
        hasher.update(format!("{name} {shape:?} {digest}\n").as_bytes());
    });
    hasher.finish()
}

/// How a decoder is made of a checkpoint.
type TakeDecoder =
    fn(&mut Checkpoint, &Device, pivotal_ops::Precision) -> pivotal_model::Result<Decoder>;

fn tokenizer(checkpoint: &Checkpoint, path: &Path) -> Result<Tokenizer> {
    let missing = |what: &'static str| Error::Setting {
        key: "model",
        found: path.display().to_string(),
        expected: what,
    };
    let source = checkpoint.tokenizer.as_ref();
    let source = source.ok_or_else(|| missing("a model with a `tokenizer.json`"))?;
    let ids = &checkpoint.config.special_ids;
    let eos = ids.eos.first().copied();
    let special = SpecialTokens {
        bos: ids.bos,
        eos: eos.ok_or_else(|| missing("a model with an `eos_token_id`"))?,
        add_bos: matches!(source, TokenizerSource::Bpe(_)).then_some(ids.add_bos),
    };
    Tokenizer::new(source, special).map_err(|error| Error::Tokenizer {
        path: match source {
            TokenizerSource::Json(_) => path.join("tokenizer.json"),
            _ => path.into(),
        },
        source: error.into(),
    })
}

fn is_of_reward_model(adapter: &LoraAdapter) -> bool {
    adapter.task == AdapterTask::SequenceClassification || adapter.value_head.is_some()
}

fn not_a_policy(key: &'static str, path: &Path) -> Error {
    Error::Setting {
        key,
        found: path.display().to_string(),
        expected: "a policy: this is a reward model, as `pivotal reward` writes it",
    }
}

/// Where the adapter lies that `--adapter` names: in it, if it is a run.
fn adapter_path(path: &Path) -> PathBuf {
    match path.join("adapter").is_dir() {
        true => path.join("adapter"),
        false => path.into(),
    }
}

/// The adapter that a directory is, or that a run holds; none of a model, whatever lies beside its weights.
fn adapter_of(path: &Path) -> Option<PathBuf> {
    let adapter = match is_model(path) {
        true => return None,
        false => adapter_path(path),
    };
    adapter
        .join("adapter_config.json")
        .is_file()
        .then_some(adapter)
}

fn model_path(path: &Path) -> PathBuf {
    match !is_model(path) && path.join("model").is_dir() {
        true => path.join("model"),
        false => path.into(),
    }
}

/// Whether a directory has a model's configuration and weights of its own.
fn is_model(path: &Path) -> bool {
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    let mut weights = weights.iter().map(|name| path.join(name));
    path.join("config.json").is_file() && weights.any(|file| file.is_file())
}
