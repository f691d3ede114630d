//! Embeddings, on the two native routes and OpenAI's.

use base64::Engine as _;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::loose::Fields;
use super::refusal::Refusal;
use super::reply::{JSON, JSON_UTF8, Reply};
use super::route::Route;
use super::text;

/// The tiny models' width.
const DIMENSIONS: usize = 64;
/// Inputs of one request.
const MOST_INPUTS: usize = 10_000;
const CONTEXT_TOKENS: usize = 4096;

/// What a request asks to embed.
pub(super) struct Embedding {
    pub model: String,
    inputs: Vec<String>,
    dimensions: usize,
    base64: bool,
    cuts: bool,
}

impl Embedding {
    pub fn read(route: Route, fields: &Fields) -> Result<Embedding, Refusal> {
        let go = if route == Route::Embeddings { "EmbeddingRequest" } else { "EmbedRequest" };
        let model = fields.text("model", go).map_err(Refusal::binding)?.unwrap_or_default().to_owned();
        let input = if route == Route::Embeddings { fields.last("prompt") } else { fields.last("input") };
        let inputs = match input {
            None | Some(Value::Null) if route == Route::OpenAiEmbeddings => {
                return Err(Refusal::binding("invalid input"));
            }
            None | Some(Value::Null) => Vec::new(),
            // The native routes take an empty text for no text.
            Some(Value::String(text)) if text.is_empty() && route != Route::OpenAiEmbeddings => Vec::new(),
            Some(Value::String(text)) => vec![text.clone()],
            Some(Value::Array(items)) if items.iter().all(Value::is_string) && items.len() <= MOST_INPUTS => {
                items.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            }
            Some(_) => return Err(Refusal::handler(400, "invalid input type")),
        };
        let base64 = match fields.plain("encoding_format").and_then(Value::as_str) {
            Some("base64") => true,
            None | Some("" | "float") => false,
            Some(other) if route == Route::OpenAiEmbeddings => {
                let words =
                    format!("Invalid value for 'encoding_format' = {other}. Supported values: ['float', 'base64'].");
                return Err(Refusal::binding(words));
            }
            Some(_) => false,
        };
        let dimensions = fields.plain("dimensions").and_then(Value::as_u64).filter(|wanted| *wanted > 0);
        Ok(Embedding {
            model,
            inputs,
            dimensions: dimensions.map_or(DIMENSIONS, |wanted| DIMENSIONS.min(wanted as usize)),
            base64,
            cuts: fields.plain("truncate").and_then(Value::as_bool).unwrap_or(true),
        })
    }

    fn tokens(&self) -> u64 {
        self.inputs.iter().map(|input| (input.len() + 2).min(CONTEXT_TOKENS) as u64).sum()
    }

    /// The reply, `total_ns` after the request came and `load_ns` of it for the model.
    pub fn answer(&self, route: Route, total_ns: u64, load_ns: u64) -> Result<Reply, Refusal> {
        if !self.cuts && self.inputs.iter().any(|input| input.len() + 2 > CONTEXT_TOKENS) {
            return Err(Refusal::handler(400, "the input length exceeds the context length"));
        }
        let mut body = Vec::new();
        Ok(match route {
            Route::Embeddings => {
                body.extend_from_slice(b"{\"embedding\":");
                let vector = self.inputs.first().map_or_else(Vec::new, |input| vector(input, DIMENSIONS));
                // This route widens every number to a double and prints all of it.
                list(&mut body, vector.iter().map(|number| f64::from(*number)));
                body.push(b'}');
                Reply::new(200, JSON_UTF8, body)
            }
            Route::OpenAiEmbeddings => {
                body.extend_from_slice(b"{\"object\":\"list\",\"data\":[");
                for (index, input) in self.inputs.iter().enumerate() {
                    if index > 0 {
                        body.push(b',');
                    }
                    body.extend_from_slice(b"{\"object\":\"embedding\",\"embedding\":");
                    let vector = vector(input, self.dimensions);
                    if self.base64 {
                        let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
                        text::string(&mut body, &base64::engine::general_purpose::STANDARD.encode(bytes));
                    } else {
                        list(&mut body, vector);
                    }
                    text::print(&mut body, format_args!(",\"index\":{index}}}"));
                }
                body.extend_from_slice(b"],\"model\":");
                text::string(&mut body, &self.model);
                let tokens = self.tokens();
                text::print(
                    &mut body,
                    format_args!(",\"usage\":{{\"prompt_tokens\":{tokens},\"total_tokens\":{tokens}}}}}\n"),
                );
                Reply::new(200, JSON, body)
            }
            _ => {
                body.extend_from_slice(b"{\"model\":");
                text::string(&mut body, &self.model);
                body.extend_from_slice(b",\"embeddings\":[");
                for (index, input) in self.inputs.iter().enumerate() {
                    if index > 0 {
                        body.push(b',');
                    }
                    list(&mut body, vector(input, self.dimensions));
                }
                body.push(b']');
                if !self.inputs.is_empty() {
                    let tokens = self.tokens();
                    text::print(
                        &mut body,
                        format_args!(
                            ",\"total_duration\":{total_ns},\"load_duration\":{load_ns},\"prompt_eval_count\":{tokens}"
                        ),
                    );
                }
                body.push(b'}');
                Reply::new(200, JSON_UTF8, body)
            }
        })
    }
}

fn list<N: std::fmt::Display>(out: &mut Vec<u8>, numbers: impl IntoIterator<Item = N>) {
    out.push(b'[');
    for (index, number) in numbers.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        text::print(out, format_args!("{number}"));
    }
    out.push(b']');
}

/// A vector of length 1 that depends on the text alone.
fn vector(of: &str, dimensions: usize) -> Vec<f32> {
    let mut numbers: Vec<f32> = (0..dimensions)
        .map(|index| {
            // Eight numbers from each digest.
            let digest = Sha256::new().chain_update(of.as_bytes()).chain_update([(index / 8) as u8]).finalize();
            let at = index % 8 * 4;
            let word = u32::from_le_bytes([digest[at], digest[at + 1], digest[at + 2], digest[at + 3]]);
            (f64::from(word) / f64::from(u32::MAX) - 0.5) as f32
        })
        .collect();
    let length = numbers.iter().map(|number| number * number).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    for number in &mut numbers {
        *number /= length;
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one_and_depend_on_the_text() {
        let one = vector("hello", 8);
        assert!((one.iter().map(|number| number * number).sum::<f32>() - 1.0).abs() < 1e-5);
        assert_eq!(one, vector("hello", 8));
        assert_ne!(one, vector("world", 8));
    }
}
