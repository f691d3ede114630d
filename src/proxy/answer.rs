//! Answers that are ours: refusals, and replies to routes that no backend sees.

use bytes::Bytes;
use http::Method;
use pingora::http::ResponseHeader;
use pingora::prelude::*;
use pingora_proxy::Session;

use super::Gateway;
use crate::door::Ticket;
use crate::identity::token_endpoint;
use crate::ledger::Way;
use crate::refusal::Refusal;

impl Gateway {
    pub(super) async fn refuse(&self, session: &mut Session, exchange: &mut Ticket, refusal: Refusal) -> Result<()> {
        let mut head = ResponseHeader::build(refusal.status(), Some(8))?;
        for (name, value) in refusal.headers() {
            head.insert_header(name, value.as_ref())?;
        }
        let body = if exchange.way == Way::Token {
            // RFC 6749's members, and not kept by anybody (contract, section 2).
            head.insert_header(http::header::CACHE_CONTROL, "no-store")?;
            token_endpoint::refusal_body(&refusal.detail, refusal.code.as_str(), refusal.status())
        } else {
            refusal.body(exchange.dialect, &exchange.request_id)
        };
        exchange.refusal = Some(refusal);
        answer(session, exchange, head, Bytes::from(body)).await
    }
}

/// Writes one whole answer.
pub(super) async fn answer(
    session: &mut Session,
    exchange: &mut Ticket,
    mut head: ResponseHeader,
    body: Bytes,
) -> Result<()> {
    head.insert_header(http::header::CONTENT_LENGTH, body.len())?;
    head.insert_header("x-request-id", exchange.request_id.as_str())?;
    // A body that is still to come is not read: the door lingers and closes, so that the client can read this first.
    if !session.as_downstream_mut().is_body_done() {
        exchange.link.close_connection();
    }
    exchange.status = Some(head.status.as_u16());
    exchange.first_byte.get_or_insert_with(std::time::Instant::now);
    let bodiless = body.is_empty() || session.req_header().method == Method::HEAD;
    session.write_response_header(Box::new(head), bodiless).await?;
    if bodiless {
        return Ok(());
    }
    session.write_response_body(Some(body), true).await
}

/// The head of an answer in JSON.
pub(super) fn json_head(status: u16) -> Result<ResponseHeader> {
    let mut head = ResponseHeader::build(status, Some(6))?;
    head.insert_header(http::header::CONTENT_TYPE, "application/json; charset=utf-8")?;
    Ok(head)
}
