//! The token endpoint and the key set: answered here, never by a backend.

use std::sync::Arc;
use std::time::Duration;

use pingora::http::ResponseHeader;
use pingora_proxy::Session;

use super::Gateway;
use super::admit::{Admitted, now_s, refuse_unread};
use super::answer::{answer, json_head};
use crate::door::Ticket;
use crate::identity::agents::AuthFailure;
use crate::identity::token_endpoint::{self, TokenError};
use crate::intake::Intake;
use crate::refusal::Refusal;

/// An id and a secret are short.
const BODY_BYTES: usize = 16 * 1024;
/// They come in one packet, and a slow one holds a place.
const BODY_IDLE: Duration = Duration::from_secs(5);

impl Gateway {
    pub(super) async fn answer_token(&self, session: &mut Session, exchange: &mut Ticket) -> Result<Admitted, Refusal> {
        let Ok(_place) = self.site.token_requests.try_acquire() else {
            return Err(Refusal::queue_full("too many token requests at once"));
        };
        // Nobody is known yet: a stranger's body may not take the room of those who are, however it is framed.
        let small = Intake {
            limit_bytes: BODY_BYTES,
            idle: self.site.intake.idle.min(BODY_IDLE),
            memory: self.site.intake.memory.clone(),
        };
        let (body, held) = small.read(session).await.map_err(|unread| refuse_unread(exchange, unread))?;
        exchange.held = Some(held);
        let content_type =
            session.req_header().headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let (status, body) = match token_endpoint::read(content_type, &body) {
            Err(e) => (e.status(), self.token_refused(exchange, e)),
            Ok(ask) => match self.authenticate(exchange, ask).await? {
                Ok(body) => (200, body),
                Err(e) => (e.status(), self.token_refused(exchange, e)),
            },
        };
        let written = async {
            let mut head: ResponseHeader = json_head(status)?;
            head.insert_header(http::header::CACHE_CONTROL, "no-store")?;
            if status == 401 {
                head.insert_header(http::header::WWW_AUTHENTICATE, "Bearer")?;
            }
            answer(session, exchange, head, body.into()).await
        };
        let _ = written.await; // the client left: nobody to tell
        Ok(Admitted::Answered)
    }

    /// argon2 is slow on purpose: off the workers, and few at once.
    async fn authenticate(
        &self,
        exchange: &mut Ticket,
        ask: token_endpoint::TokenAsk,
    ) -> Result<Result<Vec<u8>, TokenError>, Refusal> {
        let Some(issuer) = exchange.snapshot.issuer.clone() else {
            return Err(Refusal::unknown_route().because("this proxy has no key to sign tokens with"));
        };
        let Ok(_turn) = self.site.hashing.acquire().await else {
            return Err(Refusal::internal_error()); // the semaphore is never closed
        };
        let agents = Arc::clone(&exchange.snapshot.agents);
        let checked = tokio::task::spawn_blocking(move || agents.authenticate(&ask.client_id, &ask.client_secret));
        let agent = match checked.await.map_err(|_| Refusal::internal_error())? {
            Ok(agent) => agent,
            Err(AuthFailure::WrongIdOrSecret) => return Ok(Err(TokenError::InvalidClient)),
            Err(AuthFailure::Suspended) => return Ok(Err(TokenError::Suspended)),
        };
        let (token, minted) = issuer.mint(&agent.claims(), now_s()).map_err(|_| Refusal::internal_error())?;
        exchange.granted_here = true;
        exchange.token_agent = Some(agent.id.clone());
        Ok(Ok(token_endpoint::granted_body(&token, &minted, &agent)))
    }

    fn token_refused(&self, exchange: &mut Ticket, e: TokenError) -> Vec<u8> {
        exchange.refusal = Some(Refusal::invalid_token(e.code()).because(e.code()));
        e.body()
    }

    pub(super) async fn answer_jwks(&self, session: &mut Session, exchange: &mut Ticket) -> Result<Admitted, Refusal> {
        exchange.granted_here = true;
        let written = async {
            let mut head = json_head(200)?;
            head.insert_header(http::header::CACHE_CONTROL, "public, max-age=300")?;
            let jwks = exchange.snapshot.jwks.clone();
            answer(session, exchange, head, jwks).await
        };
        let _ = written.await; // the client left: nobody to tell
        Ok(Admitted::Answered)
    }
}
