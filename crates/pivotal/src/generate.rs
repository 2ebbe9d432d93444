//! `pivotal generate`: samples responses, one JSON line each.

use std::path::PathBuf;

use clap::Args;
use pivotal_core::{TokenizedPrompt, write_atomic};
use pivotal_data::{DataSet, ReadOptions, tokenize_prompts};
use pivotal_model::{Finish, GenerateSettings, Generator, Request, Sampling, StopStrings};
use pivotal_train::Error;
use pivotal_train::settings::{DataSettings, ModelSettings, Precision};
use pivotal_train::workspace::Workspace;
use serde::Serialize;

use crate::bench::at_least;
use crate::failure::Failure;
use crate::output::{check_file, print};

/// `pivotal generate`.
#[derive(Args)]
pub(crate) struct Generate {
    /// A Hugging Face directory, a .gguf file, or a run directory.
    #[arg(long)]
    model: PathBuf,
    /// A LoRA adapter, or a run directory with one.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Operands of matrix products.
    #[arg(long, default_value = "bf16")]
    precision: Precision,
    /// A JSONL file with prompts (strings or messages).
    #[arg(long, conflicts_with = "prompt", required_unless_present = "prompt")]
    data: Option<PathBuf>,
    /// A single prompt; with a chat template it is the user's message.
    #[arg(long)]
    prompt: Option<String>,
    /// Take `--prompt` as it stands, without the chat template.
    #[arg(long, requires = "prompt")]
    plain: bool,
    /// Responses to each prompt.
    #[arg(long, default_value_t = 1, value_parser = at_least::<1>)]
    samples: usize,
    /// The longest response, in tokens.
    #[arg(long, default_value_t = 128, value_parser = at_least::<1>)]
    max_new_tokens: usize,
    /// Divides the logits; 0 takes the most probable token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only this many of the most probable tokens; 0 takes all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the most probable tokens of this probability together.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Only tokens at least this probable, as a part of the most probable one's probability.
    #[arg(long, default_value_t = 0.0)]
    min_p: f64,
    /// Text that ends a response, which is cut before it; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Responses decoded together; changes no result.
    #[arg(long, default_value_t = 16, value_parser = at_least::<1>)]
    batch: usize,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The file to write; standard output if absent.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Replace an existing file.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    id: u64,
    sample: usize,
    response: String,
    finish: &'static str,
    token_ids: &'a [u32],
    token_logps: &'a [f32],
}

impl Generate {
    pub(crate) fn run(self) -> Result<(), Failure> {
        if let Some(out) = &self.out {
            let inputs = [Some(&self.model), self.adapter.as_ref(), self.data.as_ref()];
            check_file("--out", out, self.overwrite, &inputs)?;
        }
        let model = ModelSettings {
            path: self.model.clone(),
            adapter: self.adapter.clone().unwrap_or_default(),
            precision: self.precision,
            ..ModelSettings::default()
        };
        let workspace = match self.adapter {
            // It is merged into all the bits that the file has.
            Some(_) => Workspace::load(&model)?,
            None => Workspace::load_packed(&model)?,
        };
        let prompts = self.prompts(&workspace)?;
        let settings = GenerateSettings {
            sampling: Sampling {
                temperature: self.temperature,
                top_k: (self.top_k > 0).then_some(self.top_k),
                top_p: self.top_p,
                min_p: self.min_p,
            },
            samples: self.samples,
            max_tokens: self.max_new_tokens,
            eos: workspace.decoder.config().special_ids.eos.clone(),
            batch: self.batch,
            seed: self.seed,
        };
        let generator = Generator::new(&workspace.decoder, self.precision.into());
        let tokenizer = &workspace.tokenizer;
        // An id of a padded vocabulary that the tokenizer does not have shows nothing.
        let text = |ids: &[u32]| {
            let known = ids.iter().copied();
            let known: Vec<u32> = known
                .filter(|&id| tokenizer.token_text(id).is_ok())
                .collect();
            let text = tokenizer.decode_plain(&known);
            text.expect("decoding fails for unknown ids alone")
        };
        let requests: Vec<Request<'_>> = prompts
            .iter()
            .enumerate()
            .map(|(index, prompt)| Request {
                id: index as u64,
                prompt: &prompt.prompt,
            })
            .collect();
        let stop = StopStrings {
            strings: &self.stop,
            text: &text,
        };
        let stop = (!self.stop.is_empty()).then_some(stop);
        let mut generations = Vec::new();
        generator.sample_many(&requests, &settings, stop, &mut |generation| {
            generations.push(generation);
        })?;
        generations.sort_unstable_by_key(|generation| (generation.prompt, generation.sample));
        let mut lines = Vec::new();
        for generation in generations {
            let line = Line {
                id: prompts[generation.prompt].id,
                sample: generation.sample,
                response: match generation.text {
                    Some(text) => text,
                    None => text(&generation.token_ids),
                },
                finish: match generation.finish {
                    Finish::Eos => "eos",
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                },
                token_ids: &generation.token_ids,
                token_logps: &generation.token_logps,
            };
            serde_json::to_writer(&mut lines, &line).map_err(|error| Failure::system(&error))?;
            lines.push(b'\n');
        }
        match &self.out {
            Some(out) => Ok(write_atomic(out, &lines)?),
            None => print(&lines),
        }
    }

    fn prompts(&self, workspace: &Workspace) -> Result<Vec<TokenizedPrompt>, Failure> {
        let data = match (&self.data, &self.prompt) {
            (Some(path), _) => DataSet::read(path, ReadOptions::default())?,
            (None, prompt) => {
                let text = prompt.as_deref().unwrap_or_default();
                let prompt = match self.plain || workspace.template.is_none() {
                    true => serde_json::json!({ "prompt": text }),
                    false => serde_json::json!({ "prompt": [{ "role": "user", "content": text }] }),
                };
                DataSet::from_jsonl("--prompt", &prompt.to_string())?
            }
        };
        let settings = DataSettings {
            max_tokens: 0,
            ..DataSettings::default()
        };
        let options = settings.tokenize_options(workspace.decoder.config().vocab_size);
        let template = workspace.template.as_ref();
        let prompts = tokenize_prompts(&data, &workspace.tokenizer, template, &options)?.items;
        for prompt in &prompts {
            let fits = workspace
                .decoder
                .config()
                .check_length(prompt.prompt.len() + 1);
            fits.map_err(|error| Error::Record {
                path: data.path().into(),
                line: prompt.id as usize,
                what: format!("with one token of a response, {error}"),
            })?;
        }
        Ok(prompts)
    }
}
