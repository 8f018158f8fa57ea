/* global SwaggerUIBundle */
SwaggerUIBundle({
  url: "/schema",
  dom_id: "#swagger",
  deepLinking: true,
  validatorUrl: null, // its default is another host
});
