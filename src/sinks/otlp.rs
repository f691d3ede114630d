//! Lines to an OpenTelemetry collector: OTLP/HTTP with protobuf (<https://opentelemetry.io/docs/specs/otlp/#otlphttp>).
//!
//! The types are opentelemetry-proto's; the client is ours, since the exporter crates keep logs in a queue in memory, and this one has to know what was
//! taken (docs/adr/0042-otlp.md). A log record has the line as its body, word for word, and each of its members that is not null as an attribute
//! `behavry.audit.<member>`, those of `extra` as `behavry.audit.extra.<member>`. The resource is the writer.

use std::time::Duration;

use http::{HeaderName, HeaderValue, header};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message;
use serde_json::Value;

use super::line::{self, Severity};
use super::{Batch, Failure, Taken, answer, host};
use crate::config::ServiceUrl;
use crate::ledger::chain::{FORMAT, WriterName};
use crate::outbound::{Bounds, Outbound};

/// A reply says how many records were refused, and why, in a sentence.
const REPLY_BYTES: usize = 1 << 20;

pub struct Otlp {
    url: ServiceUrl,
    outbound: Outbound,
    headers: Vec<(HeaderName, HeaderValue)>,
    hostname: String,
}

impl Otlp {
    /// `headers`: what the collector asks for, such as a credential.
    pub fn new(url: ServiceUrl, outbound: Outbound, mut headers: Vec<(HeaderName, HeaderValue)>) -> Otlp {
        headers.push((header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf")));
        Otlp { url, outbound, headers, hostname: host::name() }
    }

    pub async fn deliver(&mut self, batch: &Batch, within: Duration) -> Result<Taken, Failure> {
        let body = self.request(batch).encode_to_vec().into();
        let bounds = Bounds { within, reply_bytes: REPLY_BYTES };
        let reply = self.outbound.post(&self.url, &self.headers, body, bounds).await;
        let reply = reply.map_err(|why| Failure::new(format!("{} {why}", self.url)))?;
        answer::taken(&self.url, reply.status, &reply.headers)?;
        // A page that says 200 to everything has taken nothing.
        let said = ExportLogsServiceResponse::decode(reply.body)
            .map_err(|_| Failure::new(format!("{} does not answer as a collector does", self.url)))?;
        let refused = said.partial_success.map_or(0, |partly| partly.rejected_log_records);
        Ok(Taken { refused: u64::try_from(refused).unwrap_or(0) })
    }

    fn request(&self, batch: &Batch) -> ExportLogsServiceRequest {
        let observed = std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_nanos() as u64);
        let mut resource_logs: Vec<ResourceLogs> = Vec::new();
        let mut last: Option<WriterName> = None;
        for (writer, text) in batch.lines() {
            if last != Some(writer) {
                resource_logs.push(self.of_writer(writer));
                last = Some(writer);
            }
            let logs = resource_logs.last_mut().expect("one was just pushed");
            logs.scope_logs[0].log_records.push(record(text, observed));
        }
        ExportLogsServiceRequest { resource_logs }
    }

    fn of_writer(&self, writer: WriterName) -> ResourceLogs {
        let attributes = vec![
            attribute("service.name", string("behavry-ollama-proxy")),
            attribute("service.instance.id", string(writer.as_str())),
            attribute("host.name", string(&self.hostname)),
        ];
        let scope = InstrumentationScope { name: FORMAT.to_owned(), ..InstrumentationScope::default() };
        ResourceLogs {
            resource: Some(Resource { attributes, ..Resource::default() }),
            scope_logs: vec![ScopeLogs { scope: Some(scope), ..ScopeLogs::default() }],
            ..ResourceLogs::default()
        }
    }
}

/// The lines of a file with headers: `name: value` each, empty ones left out. An error says which line, and not what stands there.
pub fn headers(text: &str) -> Result<Vec<(HeaderName, HeaderValue)>, String> {
    let mut headers = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = || format!("line {} is no header; write it as name: value", number + 1);
        let (name, value) = line.split_once(':').ok_or_else(bad)?;
        let name = HeaderName::try_from(name.trim()).map_err(|_| bad())?;
        let mut value = HeaderValue::try_from(value.trim()).map_err(|_| bad())?;
        value.set_sensitive(true);
        headers.push((name, value));
    }
    Ok(headers)
}

fn record(text: &[u8], observed_time_unix_nano: u64) -> LogRecord {
    let (severity_number, severity_text) = match line::severity(text) {
        Severity::Error => (SeverityNumber::Error, "ERROR"),
        Severity::Warning => (SeverityNumber::Warn, "WARN"),
        Severity::Notice => (SeverityNumber::Info2, "NOTICE"),
        Severity::Info => (SeverityNumber::Info, "INFO"),
    };
    let at: Option<jiff::Timestamp> = line::timestamp(text).parse().ok();
    LogRecord {
        time_unix_nano: at.map_or(0, |at| u64::try_from(at.as_nanosecond()).unwrap_or(0)),
        observed_time_unix_nano,
        severity_number: severity_number.into(),
        severity_text: severity_text.to_owned(),
        body: Some(string(&String::from_utf8_lossy(text))),
        attributes: attributes(text),
        event_name: format!("behavry.audit.{}", line::phase(text)),
        ..LogRecord::default()
    }
}

/// Members that are null are left out: an attribute that is not there is unknown.
fn attributes(text: &[u8]) -> Vec<KeyValue> {
    let Ok(Value::Object(members)) = serde_json::from_slice(text) else { return Vec::new() };
    let mut attributes = Vec::new();
    for (name, value) in members {
        match value {
            Value::Object(extra) if name == "extra" => attributes.extend(
                extra.into_iter().filter_map(|(name, value)| member(&format!("behavry.audit.extra.{name}"), value)),
            ),
            value => attributes.extend(member(&format!("behavry.audit.{name}"), value)),
        }
    }
    attributes
}

fn member(name: &str, value: Value) -> Option<KeyValue> {
    any(value).map(|value| attribute(name, AnyValue { value: Some(value) }))
}

fn any(value: Value) -> Option<Any> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(flag) => Any::BoolValue(flag),
        // A count past 2^63 has no number in OTLP; as text it is at least right.
        Value::Number(number) => number.as_i64().map_or_else(|| Any::StringValue(number.to_string()), Any::IntValue),
        Value::String(text) => Any::StringValue(text),
        Value::Array(values) => Any::ArrayValue(ArrayValue {
            values: values.into_iter().map(|value| AnyValue { value: any(value) }).collect(),
        }),
        Value::Object(members) => Any::KvlistValue(KeyValueList {
            values: members.into_iter().filter_map(|(name, value)| member(&name, value)).collect(),
        }),
    })
}

fn attribute(key: &str, value: AnyValue) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(value), ..KeyValue::default() }
}

fn string(text: &str) -> AnyValue {
    AnyValue { value: Some(Any::StringValue(text.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_becomes_a_record_with_its_time_its_members_and_itself() {
        let text = r#"{"agent_id":"ann","error":null,"extra":{"agent_roles":["a","b"],"input_tokens":26,"outcome":"timeout","phase":"final","stream":true},"timestamp":"2026-11-22T18:35:16.000001+00:00"}"#;
        let record = record(text.as_bytes(), 7);
        assert_eq!(record.time_unix_nano, 1_795_372_516_000_001_000);
        assert_eq!((record.observed_time_unix_nano, record.severity_text.as_str()), (7, "WARN"));
        assert_eq!((record.event_name.as_str(), record.body), ("behavry.audit.final", Some(string(text))));
        let attributes: Vec<(&str, Option<Any>)> = record
            .attributes
            .iter()
            .map(|one| (one.key.as_str(), one.value.clone().and_then(|value| value.value)))
            .collect();
        let text = |text: &str| Some(Any::StringValue(text.to_owned()));
        let roles = ArrayValue { values: vec![string("a"), string("b")] };
        assert_eq!(
            attributes,
            [
                ("behavry.audit.agent_id", text("ann")),
                ("behavry.audit.extra.agent_roles", Some(Any::ArrayValue(roles))),
                ("behavry.audit.extra.input_tokens", Some(Any::IntValue(26))),
                ("behavry.audit.extra.outcome", text("timeout")),
                ("behavry.audit.extra.phase", text("final")),
                ("behavry.audit.extra.stream", Some(Any::BoolValue(true))),
                ("behavry.audit.timestamp", text("2026-11-22T18:35:16.000001+00:00")),
            ]
        );
    }

    #[test]
    fn headers_are_lines_of_a_file_and_are_not_quoted_where_they_are_wrong() {
        let good = headers("authorization: Bearer s3cr3t\n\nx-tenant:one\n").expect("two headers");
        assert_eq!((good.len(), good[1].1.to_str().ok()), (2, Some("one")));
        assert!(!format!("{good:?}").contains("s3cr3t"));
        for bad in ["s3cr3t", "x-ok: 1\ns3cr3t s3cr3t: 1", "a: s3cr3t\u{1}"] {
            let why = headers(bad).expect_err("no header");
            assert!(why.contains("is no header") && !why.contains("s3cr3t"), "{why}");
        }
    }
}
