//! Conversations for supervised fine-tuning: which tokens are the assistant's own.
//!
//! Templates rarely mark them (`{% generation %}`), and a missing mark must not mean an empty mask. The spans are found by
//! rendering: before each assistant message the conversation so far with its generation prompt, after it the conversation
//! with it. Both must be token prefixes of the whole.

use crate::chat::ChatTemplate;
use crate::error::RowFault;
use crate::sample::Message;
use crate::tokenize::{
    Sequence, check_text_prefix, check_token_prefix, encode, render_fault, with_bos, with_eos,
};
use crate::tokenizer::Tokenizer;

const COLUMN: &str = "messages";

/// The prompt up to the assistant's first word, the rest up to its last EOS, and which of the rest it says.
pub(crate) fn tokenize_conversation(
    messages: &[Message],
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> Result<Sequence, RowFault> {
    let render = |count: usize, add_generation_prompt: bool| {
        template
            .render(&messages[..count], add_generation_prompt)
            .map_err(|error| render_fault(COLUMN, &error))
    };
    // What follows the assistant's last message is not learnt from.
    let last = messages
        .iter()
        .rposition(|message| message.role == "assistant");
    let count = last.map_or(0, |index| index + 1);
    let text = render(count, false)?;
    let mut ids = encode(tokenizer, COLUMN, &text)?;
    let mut mask = vec![false; ids.len()];
    let mut prompt_len = None;
    for index in (0..count).filter(|&index| messages[index].role == "assistant") {
        if messages[index].content.trim().is_empty() {
            return Err(RowFault::EmptyResponse { column: COLUMN });
        }
        let prefix = |count: usize, add_generation_prompt: bool| {
            let prefix_text = render(count, add_generation_prompt)?;
            check_text_prefix(COLUMN, template, index, &prefix_text, &text)?;
            let prefix_ids = encode(tokenizer, COLUMN, &prefix_text)?;
            check_token_prefix(tokenizer, COLUMN, &prefix_ids, &ids)?;
            Ok(prefix_ids.len())
        };
        let (start, end) = (prefix(index, true)?, prefix(index + 1, false)?);
        let spoken = with_eos(tokenizer, COLUMN, Some(template), ids[start..end].to_vec())?;
        if index + 1 == count {
            // The last turn ends with EOS even where the template writes none.
            ids.truncate(start);
            ids.extend(&spoken);
            mask.truncate(start);
            mask.resize(ids.len(), true);
        } else {
            // Inside, an EOS that the template does not write has no place to stand.
            let own = spoken.len().min(end - start);
            mask[start..start + own].fill(true);
        }
        prompt_len.get_or_insert(start);
    }
    let raw = ids.len();
    let ids = with_bos(tokenizer, COLUMN, ids)?;
    let prompt_len = prompt_len.unwrap_or(0) + ids.len() - raw;
    if prompt_len == 0 {
        return Err(RowFault::EmptyPrompt { column: COLUMN });
    }
    let first = raw - (ids.len() - prompt_len);
    let mask = mask[first..].to_vec();
    let (prompt, response) = ids.split_at(prompt_len);
    Ok(Sequence::new(prompt.to_vec(), response.to_vec(), mask))
}
