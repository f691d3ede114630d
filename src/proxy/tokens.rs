//! The token endpoint and the key set: answered here, never by a backend.
//!
//! Whoever asks for a token is a stranger still: the places, the pace of guesses and the turns at argon2 are all bounded, by client
//! address and over all of them, and none is taken from those who have a token.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use pingora::http::ResponseHeader;
use pingora_proxy::Session;

use super::Gateway;
use super::admit::{Admitted, now_s, refuse_unread};
use super::answer::{self, json_head};
use super::views::gone;
use crate::control_plane::ControlPlane;
use crate::door::Ticket;
use crate::exchange::Fault;
use crate::identity::agents::{Agent, AuthFailure};
use crate::identity::guesses::Slowed;
use crate::identity::places::NoPlace;
use crate::identity::secret::Secret;
use crate::identity::token_endpoint::{self, TokenError};
use crate::intake::{Encodings, Intake};
use crate::refusal::Refusal;
use crate::site::Site;

/// An id and a secret are short.
const BODY_BYTES: usize = 16 * 1024;
/// They come in one packet, and a slow one holds a place.
const BODY_IDLE: Duration = Duration::from_secs(5);
/// Longest wait for a turn at argon2. Checking the secrets of all places takes ten seconds on an idle core or two, so this many are a
/// machine that has a tenth of itself left for it, as one that runs models on its CPU: whoever can wait gets a token, late, instead of an
/// error at once. Who cannot wait leaves, which frees the place.
const TURN: Duration = Duration::from_secs(120);

/// What the token endpoint says. No `Debug`: it may hold a token.
struct TokenAnswer {
    status: u16,
    body: Bytes,
    retry_after: Option<HeaderValue>,
}

impl Gateway {
    pub(super) async fn answer_token(&self, session: &mut Session, exchange: &mut Ticket) -> Result<Admitted, Refusal> {
        let address = exchange.source_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let _place = self.site.token_places.take(address).map_err(|none| self.without_place(none))?;
        // Nobody is known yet: a stranger's body may not take the room of those who are, however it is framed.
        let small = Intake {
            limit_bytes: BODY_BYTES,
            idle: self.site.intake.idle.min(BODY_IDLE),
            memory: self.site.intake.memory.clone(),
        };
        let (body, held) =
            small.read(session, Encodings::Plain).await.map_err(|unread| refuse_unread(exchange, unread))?;
        exchange.held = Some(held);
        let content_type =
            session.req_header().headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = token_endpoint::media_type(content_type);
        let answer = match media_type.and_then(|it| Ok((it, token_endpoint::read(content_type, &body)?))) {
            Err(e) => self.token_refused(exchange, e),
            Ok((media_type, ask)) => {
                let answered = async {
                    match &self.site.control_plane {
                        Some(plane) => {
                            self.forward_ask(plane, exchange, address, &ask.client_id, media_type, body).await
                        }
                        None => self.authenticate(exchange, address, ask).await,
                    }
                };
                tokio::select! { biased;
                    answered = answered => answered?,
                    // Its place is free again at once; a check that has begun keeps its turn to the end.
                    () = gone(session) => {
                        exchange.fault = Some(Fault::Client);
                        return Ok(Admitted::Answered);
                    }
                }
            }
        };
        let written = async {
            let mut head: ResponseHeader = json_head(answer.status)?;
            head.insert_header(http::header::CACHE_CONTROL, "no-store")?;
            if answer.status == 401 {
                head.insert_header(http::header::WWW_AUTHENTICATE, "Bearer")?;
            }
            if let Some(retry_after) = answer.retry_after {
                head.insert_header(http::header::RETRY_AFTER, retry_after)?;
            }
            answer::answer(session, exchange, head, answer.body).await
        };
        let _ = written.await; // the client left: nobody to tell
        Ok(Admitted::Answered)
    }

    /// argon2 is slow on purpose: off the workers, few at once, and at a pace at which nobody guesses anything.
    async fn authenticate(
        &self,
        exchange: &mut Ticket,
        address: IpAddr,
        ask: token_endpoint::TokenAsk,
    ) -> Result<TokenAnswer, Refusal> {
        let Some(issuer) = exchange.snapshot.issuer.clone() else {
            return Err(Refusal::unknown_route().because("this proxy has no key to sign tokens with"));
        };
        let token_endpoint::TokenAsk { client_id, client_secret } = ask;
        let guesses = &self.site.guesses;
        let now = || self.site.started.elapsed();
        let arrival = guesses.arrive(address, &client_id, now()).map_err(|slowed| self.slow_down(slowed))?;
        let Ok(turn) = tokio::time::timeout(TURN, Arc::clone(&self.site.hashing).acquire_owned()).await else {
            self.site.ledger.metrics.token_request_turned_away("turn");
            return Err(Refusal::queue_full("no turn to check the secret came in time"));
        };
        let turn = turn.map_err(|_| Refusal::internal_error())?; // the semaphore is never closed
        let guess = guesses.guess(arrival, now()).map_err(|slowed| self.slow_down(slowed))?;
        let (site, id) = (Arc::clone(&self.site), client_id.clone());
        let checked = tokio::task::spawn_blocking(move || {
            let _turn = turn; // until the check has ended, whether or not somebody still waits for it
            check_secret(&site, &id, &client_secret)
        });
        let agent = match checked.await.map_err(|_| Refusal::internal_error())? {
            Ok(agent) => agent,
            Err(AuthFailure::WrongIdOrSecret) => return Ok(self.token_refused(exchange, TokenError::InvalidClient)),
            Err(AuthFailure::Suspended) => {
                guesses.proved(guess, now()); // only said to whoever has the secret
                return Ok(self.token_refused(exchange, TokenError::Suspended));
            }
        };
        guesses.proved(guess, now());
        let (token, minted) = issuer.mint(&agent.claims(), now_s()).map_err(|_| Refusal::internal_error())?;
        exchange.granted_here = true;
        exchange.token_agent = Some(agent.id.clone());
        let body = token_endpoint::granted_body(&token, &minted, &agent);
        Ok(TokenAnswer { status: 200, body: body.into(), retry_after: None })
    }

    /// To the control plane, which alone knows the agents: whom a token was given to is not known here. It sees one address, ours, so
    /// that guessing has to be slowed here as well.
    async fn forward_ask(
        &self,
        control_plane: &ControlPlane,
        exchange: &mut Ticket,
        address: IpAddr,
        client_id: &str,
        media_type: &'static str,
        body: Bytes,
    ) -> Result<TokenAnswer, Refusal> {
        let guesses = &self.site.guesses;
        let now = || self.site.started.elapsed();
        let arrival = guesses.arrive(address, client_id, now()).map_err(|slowed| self.slow_down(slowed))?;
        let guess = guesses.guess(arrival, now()).map_err(|slowed| self.slow_down(slowed))?;
        let asked = control_plane.token(media_type, &exchange.request_id, body).await;
        let answer = match asked {
            Ok(answer) => answer,
            Err(why) => {
                guesses.unjudged(guess);
                return Err(Refusal::control_plane_unavailable(why.to_string()));
            }
        };
        match answer.status {
            200 => guesses.proved(guess, now()),
            429 => guesses.unjudged(guess), // it did not look at the secret
            _ => {}                         // paid as a wrong one
        }
        if answer.status == 200 {
            exchange.granted_here = true;
        } else {
            let cause = format!("the control plane refused: {}", answer.word);
            exchange.refusal = Some(Refusal::invalid_token("refused").because(cause));
        }
        Ok(TokenAnswer { status: answer.status, body: answer.body, retry_after: answer.retry_after })
    }

    fn without_place(&self, none: NoPlace) -> Refusal {
        let (word, refusal) = match none {
            NoPlace::Address => ("address_share", Refusal::queue_share_full(1)),
            NoPlace::Everybody => ("places", Refusal::queue_full("too many token requests at once")),
        };
        self.site.ledger.metrics.token_request_turned_away(word);
        refusal
    }

    /// One wording for whichever allowance is used up: only the audit says which.
    fn slow_down(&self, slowed: Slowed) -> Refusal {
        let (word, retry_after_s, cause) = match slowed {
            Slowed::Address { retry_after_s } => {
                ("address_rate", retry_after_s, "too many token requests from this address")
            }
            Slowed::Client { retry_after_s } => {
                ("client_rate", retry_after_s, "too many wrong secrets for this client_id")
            }
        };
        self.site.ledger.metrics.token_request_turned_away(word);
        Refusal::rate_limited(retry_after_s).because(cause)
    }

    fn token_refused(&self, exchange: &mut Ticket, e: TokenError) -> TokenAnswer {
        exchange.refusal = Some(Refusal::invalid_token(e.code()).because(e.code()));
        TokenAnswer { status: e.status(), body: e.body().into(), retry_after: None }
    }

    pub(super) async fn answer_jwks(&self, session: &mut Session, exchange: &mut Ticket) -> Result<Admitted, Refusal> {
        exchange.granted_here = true;
        let written = async {
            let mut head = json_head(200)?;
            head.insert_header(http::header::CACHE_CONTROL, "public, max-age=300")?;
            let jwks = exchange.snapshot.jwks.clone();
            answer::answer(session, exchange, head, jwks).await
        };
        let _ = written.await; // the client left: nobody to tell
        Ok(Admitted::Answered)
    }
}

/// By the agents of now, not by those of when the request came: it may have waited for its turn while a secret was rotated or an agent
/// suspended, and whoever did that was told that it is done. So it is checked again where the agent changed during the check.
fn check_secret(site: &Site, id: &str, secret: &Secret) -> Result<Agent, AuthFailure> {
    loop {
        let agents = Arc::clone(&site.snapshot.load().agents);
        let checked = agents.authenticate(id, secret);
        // Ends: nobody edits one agent again and again within the milliseconds of a check.
        if agents.agrees_on(&site.snapshot.load().agents, id) {
            return checked;
        }
    }
}
