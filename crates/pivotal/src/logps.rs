//! `pivotal logps`: how anyone checks us against transformers.

use std::path::PathBuf;

use clap::Args;
use pivotal_train::score::{Group, token_logps};
use pivotal_train::settings::{ComputeDevice, ModelSettings, Precision};
use pivotal_train::workspace::Workspace;
use serde::Serialize;

use crate::failure::Failure;
use crate::output::print_line;

/// `pivotal logps`.
#[derive(Args)]
pub(crate) struct Logps {
    /// A Hugging Face directory, a .gguf file, or a run directory.
    #[arg(long)]
    model: PathBuf,
    /// A LoRA adapter, or a run directory with one.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Operands of matrix products.
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Where to compute; all but cpu need a program built with the cargo feature of that name.
    #[arg(long, default_value = "cpu")]
    device: ComputeDevice,
    /// The text.
    #[arg(long, conflicts_with = "ids", required_unless_present = "ids")]
    text: Option<String>,
    /// Token ids, as a JSON list.
    #[arg(long)]
    ids: Option<String>,
}

#[derive(Serialize)]
struct Line {
    token_ids: Vec<u32>,
    token_logps: Vec<f32>,
}

impl Logps {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let ids = self.ids.as_deref().map(parse_ids).transpose()?;
        let workspace = Workspace::load_packed(&ModelSettings {
            path: self.model,
            adapter: self.adapter.unwrap_or_default(),
            precision: self.precision,
            device: self.device,
        })?;
        let token_ids = match (ids, self.text) {
            (Some(ids), _) => ids,
            (None, text) => {
                let bos = workspace
                    .tokenizer
                    .bos()
                    .filter(|_| workspace.tokenizer.adds_bos());
                let ids = workspace.tokenizer.encode(&text.unwrap_or_default())?;
                bos.into_iter().chain(ids).collect()
            }
        };
        workspace.decoder.config().check_tokens(&token_ids)?;
        let token_logps = match token_ids.as_slice() {
            [] => {
                return Err(Failure::input(
                    "there is no token; give a text or at least one id",
                ));
            }
            [_] => Vec::new(),
            [first, rest @ ..] => {
                let group = Group {
                    prompt: &[*first],
                    responses: vec![rest],
                };
                token_logps(&workspace.decoder, &[group], usize::MAX)?
                    .remove(0)
                    .remove(0)
            }
        };
        // JSON has no number for what is none.
        if let Some(index) = token_logps.iter().position(|logp| !logp.is_finite()) {
            let what = format!("log-probability of token {}", index + 1);
            return Err(pivotal_model::Error::NotFinite { what }.into());
        }
        let line = serde_json::to_string(&Line {
            token_ids,
            token_logps,
        });
        print_line(&line.map_err(|error| Failure::system(&error))?)
    }
}

fn parse_ids(text: &str) -> Result<Vec<u32>, Failure> {
    serde_json::from_str(text).map_err(|error| {
        Failure::input(format!(
            "`--ids` is `{text}`, expected a JSON list of token ids: {error}"
        ))
    })
}
